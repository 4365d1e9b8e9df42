"""What the operations get besides tensors: the pattern as text, and numbers."""

from __future__ import annotations

from splat.pattern import Pattern, parse
from splat.remembered import Remembered

#: pattern, scale, logits_soft_cap, query_offset: as the operations have them; one offset a sequence where they differ.
Static = tuple[str, float | None, float | None, int | tuple[int, ...]]

_patterns = Remembered(entries=256, nbytes=1 << 27)


def pattern_in(static: Static) -> Pattern:
    """The pattern that the text describes: the same object each time, as long as it is remembered."""
    text = static[0]
    return _patterns(text, lambda: parse(text))
