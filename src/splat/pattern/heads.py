"""`per_head`: a pattern for each query head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from splat.errors import PatternError
from splat.pattern.core import Axis, Pattern, Run, _combine


@dataclasses.dataclass(frozen=True, repr=False)
class PerHead(Pattern):
    """Query head n attends by `patterns[n]`. A set of pairs per head: it combines with others head by head."""

    patterns: tuple[Pattern, ...]

    @property
    def children(self) -> tuple[Pattern, ...]:
        return self.patterns

    def groups(self) -> dict[Pattern, list[int]]:
        """The distinct patterns, each with its query heads, in order of first use."""
        out: dict[Pattern, list[int]] = {}
        for head, pattern in enumerate(self.patterns):
            out.setdefault(pattern, []).append(head)
        return out

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        raise PatternError(
            "per_head([...]) is one pattern per query head, not one set of pairs. Look at its .patterns one by one; "
            "splat.attention takes it whole."
        )

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        return self.runs(rows, cols)

    def to_dense(self, q_len: int, kv_len: int | None = None, *, query_offset: int = 0) -> np.ndarray:
        """The masks, bool [num_q_heads, q_len, kv_len]."""
        return np.stack([p.to_dense(q_len, kv_len, query_offset=query_offset) for p in self.patterns])

    def _each(self, operation: str, *others: object) -> PerHead:
        columns: list[tuple[Pattern, ...]] = [self.patterns]
        for other in others:
            if isinstance(other, PerHead) and len(other.patterns) != len(self.patterns):
                raise PatternError(
                    f"per_head: {len(self.patterns)} and {len(other.patterns)} heads cannot be combined head by head"
                )
            if not isinstance(other, Pattern):
                return NotImplemented
            columns.append(other.patterns if isinstance(other, PerHead) else (other,) * len(self.patterns))
        return PerHead(tuple(getattr(first, operation)(*rest) for first, *rest in zip(*columns, strict=True)))

    def lift(self, operation: str, left: Pattern) -> Pattern:
        """`left` combined with every head's pattern (`left & per_head(...)`)."""
        return PerHead(tuple(_combine(operation, left, p) for p in self.patterns))

    def __and__(self, other: Pattern) -> Pattern:
        return self._each("__and__", other)

    def __or__(self, other: Pattern) -> Pattern:
        return self._each("__or__", other)

    def __sub__(self, other: Pattern) -> Pattern:
        return self._each("__sub__", other)

    def __invert__(self) -> Pattern:
        return self._each("__invert__")

    @property
    def T(self) -> Pattern:
        return PerHead(tuple(p.T for p in self.patterns))

    def __repr__(self) -> str:
        return f"per_head([{', '.join(map(repr, self.patterns))}])"


def key_heads(heads: Sequence[int], share: int) -> tuple[int, ...]:
    """The key heads of query heads, `share` of which have one: each once where equally many in a row use it."""
    used = [head // share for head in heads]
    distinct = list(dict.fromkeys(used))
    group = len(used) // len(distinct)
    return tuple(distinct if used == [kv for kv in distinct for _ in range(group)] else used)


def per_head(patterns: Iterable[Pattern]) -> Pattern:
    """A pattern for each query head, in order. Heads with equal patterns are computed together.

    Raises:
      PatternError: no pattern given, something else given, or per_head inside per_head.
    """
    if isinstance(patterns, Pattern | str) or not isinstance(patterns, Iterable):
        raise PatternError(f"per_head: patterns must be a list, one for each query head, but {patterns!r} was given")
    given = tuple(patterns)
    for n, pattern in enumerate(given):
        if not isinstance(pattern, Pattern) or isinstance(pattern, PerHead):
            raise PatternError(f"per_head: patterns[{n}] must be a pattern for one head, but {pattern!r} was given")
    if not given:
        raise PatternError("per_head: patterns must name at least one head, but an empty list was given")
    return PerHead(given)
