"""Random patterns, each with an independent statement of what it means.

`cases()` draws a pattern, sizes to use it at, and a *predicate*: a plain NumPy function of query position i and key
position j. The predicates are written from the vocabulary's definition and share no code with SPLAT, so that

    case.pattern.to_dense(case.q_len, case.kv_len, query_offset=case.query_offset) == case.mask

is a theorem about SPLAT. Expressions are composed with `& | - ~ .T`, and their predicates with the same operations on
booleans. An expression that SPLAT refuses as too irregular is rejected and counted, see `tally`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, reject, settings
from hypothesis import strategies as st

import splat
from splat.errors import IrregularPatternError
from splat.pattern import Axis, Pattern

Array = np.ndarray[Any, Any]
Predicate = Callable[[Array, Array], Array]  # int arrays i, j that broadcast -> bool array of their joint shape

#: "tried", "refused" and "large": how many expressions were drawn, how many SPLAT would not serve, and how many have
#: more than MOST_COMPONENTS.
tally: collections.Counter[str] = collections.Counter()

#: Expressions with more are left out, because a test of one takes as long as of a hundred others.
MOST_COMPONENTS = 64


def more(factor: int) -> settings:
    """Settings for a property that deserves `factor` times the profile's examples."""
    return settings(max_examples=factor * settings().max_examples)


def fewer(divisor: int) -> settings:
    """Settings for a property whose examples take seconds: a `divisor`th of the profile's examples.

    They are not shrunk: that takes minutes.
    """
    return settings(
        max_examples=settings().max_examples // divisor,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


class Positions(NamedTuple):
    """The absolute positions that a pattern is used at."""

    rows: range
    cols: range

    @property
    def swapped(self) -> Positions:
        return Positions(self.cols, self.rows)


@dataclasses.dataclass(frozen=True)
class Case:
    """A pattern, the sizes it is used at, and its meaning there."""

    pattern: Pattern
    q_len: int
    kv_len: int
    query_offset: int
    predicate: Predicate = dataclasses.field(repr=False)

    @property
    def rows(self) -> Axis:
        return Axis(self.query_offset, self.q_len)

    @property
    def cols(self) -> Axis:
        return Axis(0, self.kv_len)

    @property
    def mask(self) -> Array:
        """bool [q_len, kv_len], by the predicate alone."""
        return dense(self.predicate, self.q_len, self.kv_len, self.query_offset)


def dense(predicate: Predicate, q_len: int, kv_len: int, query_offset: int = 0) -> Array:
    """The mask of a predicate, bool [q_len, kv_len]."""
    i, j = query_offset + np.arange(q_len)[:, None], np.arange(kv_len)[None, :]
    return np.broadcast_to(predicate(i, j), (q_len, kv_len))


# -- what every constructor means --------------------------------------------------------------------------------------


def full() -> Predicate:
    return lambda i, j: (i == i) & (j == j)


def causal() -> Predicate:
    return lambda i, j: j <= i


def window(left: int, right: int) -> Predicate:
    return lambda i, j: (i - left <= j) & (j <= i + right)


def sliding_window(n: int) -> Predicate:
    return lambda i, j: (i - n < j) & (j <= i)


def dilated_window(left: int, right: int, dilation: int) -> Predicate:
    def allowed(i: Array, j: Array) -> Array:
        t, rest = np.divmod(j - i, dilation)
        return (rest == 0) & (-left <= t) & (t <= right)

    return allowed


def strided(stride: int) -> Predicate:
    return lambda i, j: (j - i) % stride == 0


def lattice_columns(stride: int, offset: int) -> Predicate:
    return lambda i, j: ((j - offset) % stride == 0) & (i == i)


def blocked(block: int, before: int, after: int) -> Predicate:
    return lambda i, j: (i // block - before <= j // block) & (j // block <= i // block + after)


def sink(n: int) -> Predicate:
    return lambda i, j: (j < n) & (i == i)


def global_rows(n: int) -> Predicate:
    return lambda i, j: (i < n) & (j == j)


def global_tokens(n: int) -> Predicate:
    return lambda i, j: (i < n) | (j < n)


def segments(ids: Sequence[int]) -> Predicate:
    of = np.asarray(ids, np.int64)
    return lambda i, j: (of[i] == of[j]) & (of[i] >= 0)


def segment_lengths(lengths: Sequence[int], positions: int) -> Predicate:
    ids = [document for document, length in enumerate(lengths) for _ in range(length)]
    return segments(ids + [-1] * max(positions - len(ids), 0))


def random_blocks(block: int, per_row: int, seed: int, kv_stop: int) -> Predicate:
    """Floyd's sampling of `per_row` of the block columns, from MurmurHash3's finaliser, in Python's integers.

    The choice is part of the meaning: it is the same on every machine and in every version.
    """
    word = 0xFFFFFFFF

    def mix(value: int) -> int:
        value = (value ^ value >> 16) * 0x85EBCA6B & word
        value = (value ^ value >> 13) * 0xC2B2AE35 & word
        return value ^ value >> 16

    num_cols = -(-kv_stop // block)

    def chosen(block_row: int) -> set[int]:
        base = mix((block_row + seed * 0x9E3779B9) & word)
        out: set[int] = set()
        picks = min(per_row, num_cols)
        for t in range(picks):
            top = num_cols - picks + t
            draw = mix((base + (t + 1) * 0x7F4A7C15) & word) % (top + 1)
            out.add(top if draw in out else draw)
        return out

    def allowed(i: Array, j: Array) -> Array:
        i, j = np.broadcast_arrays(i, j)
        table = {int(row): chosen(int(row)) for row in np.unique(i // block)}
        return np.vectorize(lambda row, col: int(col) in table[int(row)], otypes=[bool])(i // block, j // block)

    return allowed


def neighborhood(shape: Sequence[int], kernel: Sequence[int], dilation: Sequence[int], causal: Sequence[bool]):
    """Every dimension by itself, by looking for the nearest neighbours of the own dilation group."""

    def neighbours(x: int, length: int, k: int, d: int, is_causal: bool) -> set[int]:
        group = range(x % d, length, d)
        m = group.index(x)
        if is_causal:
            return set(group[max(m - k + 1, 0) : m + 1])
        # Of all runs of k, the one whose middle is nearest to the query.
        first = min(range(len(group) - k + 1), key=lambda first: abs(first + k // 2 - m))
        return set(group[first : first + k])

    tables = []
    for length, k, d, flag in zip(shape, kernel, dilation, causal, strict=True):
        table = np.zeros((length, length), bool)
        for x in range(length):
            table[x, sorted(neighbours(x, length, k, d, flag))] = True
        tables.append(table)

    def allowed(i: Array, j: Array) -> Array:
        out = np.ones(np.broadcast_shapes(np.shape(i), np.shape(j)), bool)
        for table, x, y in zip(tables, np.unravel_index(i, shape), np.unravel_index(j, shape), strict=True):
            out &= table[x, y]
        return out

    return allowed


def from_pairs(mask: Array) -> Predicate:
    return lambda i, j: mask[i, j]


def runs_mask(start: Array, stride: Array, count: Array, shape: tuple[int, int]) -> Array:
    """The mask of runs [components, rows], element by element; what leaves it is cut off."""
    mask = np.zeros(shape, bool)
    strides = np.broadcast_to(stride, start.shape)
    for where in np.ndindex(start.shape):
        for t in range(int(count[where])):
            column = int(start[where]) + int(strides[where]) * t
            if 0 <= column < shape[1]:
                mask[where[-1], column] = True
    return mask


# -- strategies --------------------------------------------------------------------------------------------------------

_SMALL = st.integers(0, 8)
_REACH = st.one_of(_SMALL, st.integers(0, 60))  # past every edge, now and then
_STRIDE = st.one_of(st.integers(1, 8), st.sampled_from([12, 16, 31, 50]))
_SEED = st.integers(0, 2**16)

Draw = Callable[[st.SearchStrategy[Any]], Any]
Primitive = tuple[Pattern, Predicate]


def _simple(constructor: Callable[..., Pattern], meaning: Callable[..., Predicate], *arguments: st.SearchStrategy[int]):
    def draw_one(draw: Draw, _: Positions) -> Primitive:
        values = [draw(argument) for argument in arguments]
        return constructor(*values), meaning(*values)

    return draw_one


def _segments(draw: Draw, at: Positions) -> Primitive:
    need = max(at.rows.stop, at.cols.stop)
    stretches = draw(st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 12)), min_size=1, max_size=8))
    ids = [one for one, length in stretches for _ in range(length)]
    ids = (ids * -(-need // len(ids)))[: need + draw(_SMALL)]
    ids += [-1] * (need - len(ids))
    return splat.segments(np.array(ids)), segments(ids)


def _segment_lengths(draw: Draw, at: Positions) -> Primitive:
    lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=6))
    return splat.segments(lengths=lengths), segment_lengths(lengths, max(at.rows.stop, at.cols.stop))


def _random_blocks(draw: Draw, at: Positions) -> Primitive:
    block, per_row, seed = draw(st.integers(1, 12)), draw(st.integers(0, 4)), draw(_SEED)
    return splat.random_blocks(block, per_row, seed), random_blocks(block, per_row, seed, at.cols.stop)


def _neighborhood(draw: Draw, at: Positions) -> Primitive:
    lead = draw(st.lists(st.integers(1, 5), max_size=2))
    last = -(-max(at.rows.stop, at.cols.stop) // math.prod(lead)) + draw(st.integers(0, 2))
    shape = (*lead, last)
    kernel = tuple(draw(st.integers(1, min(length, 5))) for length in shape)
    dilation = tuple(draw(st.integers(1, min(length // k, 3))) for length, k in zip(shape, kernel, strict=True))
    flags = tuple(draw(st.booleans()) for _ in shape)
    return splat.neighborhood(shape, kernel, dilation, flags), neighborhood(shape, kernel, dilation, flags)


def _given_runs(draw: Draw, rows: int, cols: int) -> tuple[Array, Array, Array]:
    """start and count [components, rows], one stride a component; they may overlap and leave the matrix."""
    rng = np.random.default_rng(draw(_SEED))
    components = draw(st.integers(1, 2))
    stride = np.array([draw(st.integers(1, 6)) for _ in range(components)])
    start = rng.integers(-4, cols + 2, (components, rows))
    if draw(st.booleans()):  # rows that have something to do with each other
        start = start[:, :1] + np.arange(rows) * draw(st.sampled_from([0, 1, 1, 2]))
    return start, stride, rng.integers(0, draw(st.integers(1, 12)) + 1, (components, rows))


def _from_runs(draw: Draw, at: Positions) -> Primitive:
    start, stride, count = _given_runs(draw, at.rows.stop, at.cols.stop)
    mask = runs_mask(start, stride[:, None], count, (at.rows.stop, at.cols.stop))
    kv_len = draw(st.sampled_from([None, at.cols.stop]))
    return splat.from_runs(start, stride, count, kv_len=kv_len), from_pairs(mask)


def _from_mask(draw: Draw, at: Positions) -> Primitive:
    shape = (at.rows.stop, at.cols.stop)
    start, stride, count = _given_runs(draw, *shape)
    mask = runs_mask(start, stride[:, None], count, shape)
    if draw(st.booleans()):
        return splat.from_mask(mask), from_pairs(mask)
    indptr = np.concatenate([[0], np.cumsum(mask.sum(axis=1))])
    return splat.from_csr(indptr, np.nonzero(mask)[1], shape), from_pairs(mask)


#: name -> draw one; together they are the whole vocabulary.
PRIMITIVES: dict[str, Callable[[Draw, Positions], Primitive]] = {
    "full": _simple(splat.full, full),
    "causal": _simple(splat.causal, causal),
    "window": _simple(splat.window, window, _REACH, _REACH),
    "sliding_window": _simple(splat.sliding_window, sliding_window, st.integers(1, 60)),
    "dilated_window": _simple(splat.dilated_window, dilated_window, _SMALL, _SMALL, _STRIDE),
    "strided": _simple(splat.strided, strided, _STRIDE),
    "lattice_columns": _simple(splat.lattice_columns, lattice_columns, _STRIDE, st.integers(-9, 60)),
    "blocked": _simple(splat.blocked, blocked, st.integers(1, 60), st.integers(0, 3), st.integers(0, 3)),
    "sink": _simple(splat.sink, sink, _REACH),
    "global_columns": _simple(splat.global_columns, sink, _REACH),
    "global_rows": _simple(splat.global_rows, global_rows, _REACH),
    "global_tokens": _simple(splat.global_tokens, global_tokens, _REACH),
    "segments": _segments,
    "segments(lengths)": _segment_lengths,
    "random_blocks": _random_blocks,
    "neighborhood": _neighborhood,
    "from_runs": _from_runs,
    "from_mask": _from_mask,
}


def _expression(draw: Draw, at: Positions, depth: int, names: Sequence[str]) -> Primitive:
    operation = draw(st.sampled_from(["", "&", "|", "-", "~", "T"])) if depth else ""
    if not operation:
        return PRIMITIVES[draw(st.sampled_from(names))](draw, at)
    a, f = _expression(draw, at.swapped if operation == "T" else at, depth - 1, names)
    if operation == "T":
        return a.T, lambda i, j: f(j, i)
    if operation == "~":
        return ~a, lambda i, j: ~f(i, j)
    b, g = _expression(draw, at, depth - 1, names)
    if operation == "&":
        return a & b, lambda i, j: f(i, j) & g(i, j)
    if operation == "|":
        return a | b, lambda i, j: f(i, j) | g(i, j)
    return a - b, lambda i, j: f(i, j) & ~g(i, j)


def sizes(max_len: int) -> st.SearchStrategy[tuple[int, int, int]]:
    """(q_len, kv_len, query_offset), square and without offset as often as not."""
    length = st.integers(1, max_len)
    return st.one_of(
        length.map(lambda n: (n, n, 0)),
        st.tuples(length, length, st.just(0)),
        st.tuples(length, length, st.integers(0, max_len + 8)),
    )


@st.composite
def cases(draw: Draw, max_len: int = 48, depth: int = 3, names: Sequence[str] = tuple(PRIMITIVES)) -> Case:
    """A random expression of at most `depth` operations on top of each other, at random sizes.

    What SPLAT refuses with IrregularPatternError is rejected; any other error is the test's to show.
    """
    q_len, kv_len, offset = draw(sizes(max_len))
    at = Positions(range(offset, offset + q_len), range(kv_len))
    pattern, predicate = _expression(draw, at, depth, names)
    case = Case(pattern, q_len, kv_len, offset, predicate)
    tally["tried"] += 1
    try:
        runs = [pattern.runs(case.rows, case.cols), pattern.column_runs(case.cols, case.rows)]
    except IrregularPatternError:
        tally["refused"] += 1
        reject()
    if max(map(len, runs)) > MOST_COMPONENTS:
        tally["large"] += 1
        reject()
    return case
