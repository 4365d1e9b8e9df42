"""The generated C++: one short translation unit per kernel, which spells a plan's static facts as types.

The kernels are the templates in `include/splat`. What depends on the pattern is spelled out here: which walks there
are, their strides, which phases they have and what a masked phase compares. Equal facts give one text, whatever the
lengths.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from splat import __version__
from splat.codegen.cpp import score_mod
from splat.codegen.cpp.lower import ALONE, GROUP, PassFacts, WalkFacts
from splat.codegen.scalars import Modification

#: dtype -> its type in C++.
SCALARS = {"float32": "float", "float64": "double", "bfloat16": "bfloat16", "float16": "float16"}

#: kernel -> (what it computes, what a group's rows are, what they attend to).
_WORDS = {
    "forward": ("attention, forward", "queries", "keys"),
    "d_query": ("attention, gradient of the queries", "queries", "keys"),
    "d_key_value": ("attention, gradients of keys and values", "keys", "queries"),
    "backward": ("attention, all gradients", "queries", "keys"),
    "decode": ("attention of few queries, forward", "queries", "keys"),
}

KERNELS = tuple(_WORDS)


def few_queries(dtype: str) -> int:
    """Up to so many queries have a kernel of their own: there they do not fill the lanes of the other one.

    For bfloat16 the other one has faster products. (Measured where it has pairs of it, not yet with matrix tiles.)
    """
    return 6 if dtype == "bfloat16" else 8


def forward_kernel(q_len: int, dtype: str, *, modified: bool = False) -> str:
    """The kernel of a forward; one for few queries there is for scores as they are."""
    return "decode" if q_len <= few_queries(dtype) and not modified else "forward"


def gradient_kernels(dtype: str, heads: Any, threads: int) -> tuple[str, ...]:
    """The kernels of a backward: all in one where dK and dV add up in the results and heads keep threads busy.

    The one takes five matrix products, the two seven, but they share out row tiles instead of key heads (`heads`,
    those of all batch entries; a program for any batch does not know them).
    """
    if not isinstance(heads, int):
        return ("d_query", "d_key_value")
    rounds = -(-heads // threads)
    if "backward" in every_gradient_kernel(dtype) and heads >= 0.8 * rounds * threads:
        return ("backward",)
    return ("d_query", "d_key_value")


def every_gradient_kernel(dtype: str) -> tuple[str, ...]:
    """Those that `gradient_kernels` chooses from."""
    two = ("d_query", "d_key_value")
    return ("backward", *two) if dtype in ("float32", "float64") else two


@dataclasses.dataclass(frozen=True)
class KernelFacts:
    """Everything static about one kernel.

    Attributes:
      soft_cap: whether scores are capped.
      guard: whether columns that no row of a group keeps may hold NaN, and must not be read.
      passes: at least one, of which the first covers every row, if any does; none for "decode".
      amx: whether matrix tiles may be used, where there is a kernel for them and the compiler's flags have them.
      score_mod: what becomes of scores, if anything.
    """

    kernel: str
    dtype: str
    head_dim: int
    soft_cap: bool
    guard: bool
    passes: tuple[PassFacts, ...]
    amx: bool = False
    score_mod: Modification | None = None

    @property
    def modified(self) -> bool:
        return self.score_mod is not None

    @property
    def fill(self) -> bool:
        """Whether some rows may be in no group of the first pass, so that results are written before it."""
        return bool(self.passes) and not self.passes[0].covers_rows


def library_name(facts: KernelFacts) -> str:
    """What its compilation is called, for people: "forward_float32_h64"."""
    return f"{facts.kernel}_{facts.dtype}_h{facts.head_dim}"


@lru_cache(maxsize=512)
def source(facts: KernelFacts) -> str:
    """The text of the kernel's translation unit."""
    what, *_ = _WORDS[facts.kernel]
    flags = ", ".join(
        f"{name} = {_flag(getattr(facts, name))}" for name in ("soft_cap", "guard", "fill", "amx", "modified")
    )
    passes = [line for n, one in enumerate(facts.passes) for line in ("", *_pass(n, one, facts.kernel))]
    names = "".join(f", Pass{n}" for n in range(len(facts.passes)))
    more_facts, before = [f"static constexpr bool {flags};"], ()
    if facts.score_mod is not None:
        more_facts.append("using Mod = ScoreMod;")
        before = (*score_mod.text(facts.score_mod), "")
    return translation_unit(
        what,
        ("ffi.hpp", f"{facts.kernel}.hpp"),
        facts.dtype,
        facts.head_dim,
        f"SPLAT_KERNEL({facts.kernel}, Facts{names})",
        more_facts=more_facts,
        types=passes,
        before=before,
    )


def translation_unit(
    what: str, headers: Sequence[str], dtype: str, head_dim: int, entry: str, *,
    more_facts: Sequence[str] = (), types: Sequence[str] = (), before: Sequence[str] = (),
) -> str:  # fmt: skip
    """The text around a kernel's facts: `entry` is the macro that makes its handler, `types` are lines before it, and
    `before` those before the facts."""
    members = (f"using Scalar = {SCALARS[dtype]};", f"static constexpr int head_dim = {head_dim};", *more_facts)
    lines = [
        f"// splat {__version__}: {what}; {dtype}, head dim {head_dim}.",
        *(f'#include "splat/{header}"' for header in headers),
        "",
        "namespace {",
        "",
        "using namespace splat;",
        "",
        *before,
        "struct Facts {",
        *(f"  {member}" for member in members),
        "};",
        *types,
        "",
        "}  // namespace",
        "",
        entry,
    ]
    return "\n".join(lines) + "\n"


def _pass(n: int, facts: PassFacts, kernel: str) -> Iterator[str]:
    _, rows, columns = _WORDS[kernel]
    where = "read from a table" if facts.step is None else "neighbours"
    if facts.step is not None and facts.step > 1:
        where = "of which one is there" if facts.step == ALONE else f"{facts.step} apart"
    yield f"// Groups of {GROUP} {rows}, {where}."
    for w, walk in enumerate(facts.walks):
        which = f"Walks w = 0 to {facts.loop - 1}" if facts.loop else f"Walk {w}"
        words = f"{which}: {columns} x{'' if walk.stride == 1 else f' in steps of {walk.stride}'}"
        yield from _comment(f"{words}, {_kept_words(walk, rows, 'w' if facts.loop else None)}.")
    yield f"using Pass{n} = Pass</*step*/ {facts.step or 0}, /*tests*/ {facts.num_tests},"
    texts = [_loop(facts)] if facts.loop else [_walk(walk) for walk in facts.walks]
    for w, text in enumerate(texts):
        yield f"    {text}{'>;' if w == len(texts) - 1 else ','}"


def _kept_words(walk: WalkFacts, rows: str, row: str | None) -> str:
    """Such as "by all queries; at the edges by those with lower[0] <= x < upper[0]"."""
    tests = []
    for test in walk.tests:
        at = f"[{test.component if row is None else row}]"
        both = f"lower{at} <= x < upper{at}"
        tests.append(both if test.lower and test.upper else f"lower{at} <= x" if test.lower else f"x < upper{at}")
    compared = f"those with {' or '.join(tests)}"
    if walk.full:
        return f"by all {rows}" + (f"; at the edges by {compared}" if walk.edges else "")
    return f"by {compared}"


def _comment(text: str) -> list[str]:
    """As lines; comparisons stay together."""
    whole = text.replace(" <= ", "\0<=\0").replace(" < ", "\0<\0")
    lines = textwrap.wrap(whole, 120, initial_indent="// ", subsequent_indent="//   ")
    return [line.replace("\0", " ") for line in lines]


def _walk(walk: WalkFacts) -> str:
    tests = "".join(f", Test<{t.component}, {_flag(t.lower)}, {_flag(t.upper)}>" for t in walk.tests)
    return f"Walk</*stride*/ {walk.stride}, /*full*/ {_flag(walk.full)}, /*edges*/ {_flag(walk.edges)}{tests}>"


def _loop(facts: PassFacts) -> str:
    (walk,) = facts.walks
    return (
        f"Loop</*walks*/ {facts.loop}, /*stride*/ {walk.stride}, /*full*/ {_flag(walk.full)}, "
        f"/*edges*/ {_flag(walk.edges)}>"
    )


def _flag(value: bool) -> str:
    return str(value).lower()
