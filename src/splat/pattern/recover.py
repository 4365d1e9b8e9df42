"""Boolean structure -> affine components: the arithmetic progressions behind a mask.

    columns of row i  ==  disjoint union over components c of  start_c[i] + stride_c * [0, count_c[i])

One operation does the work. *Peeling* a stride d takes every maximal run of stride d out of all rows at once:

    columns 0 1 2 3 . . 6 . . 9 . . 12      peel 1 ->  0:4          leaves  6 9 12
                                            peel 3 ->  6 9 12       leaves  nothing

What the last stride leaves are singletons; a run of one element has any stride, so a singleton may go to a component of
any stride. A sequence of strides needs as many components as the sum over the strides of the most runs in one row, or
as the most runs of all kinds in one row where that is more. The sequence that needs fewest is looked for on a sample of
the distinct rows (rows that are translations of each other are one), then applied to all of them. Finally every run
gets a component, such that each component changes as little as possible from row to row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from splat.errors import ArgumentError, IrregularPatternError

Array = np.ndarray[Any, Any]
Step = tuple[int, int]  # a stride, and how many elements a run must at least have to be peeled

_SAMPLE_ELEMENTS = 40_000
_SAMPLE_ROWS = 192
_ROUNDS = 4  # times the sample grows by the rows it turned out not to speak for
_LAGS = 8  # differences between a column and its 1st..8th successor suggest strides
_EFFORT = 16_000_000  # elements a search may peel; a count and not a time, so that results are deterministic


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Sorted (row, column) pairs, each as the integer row * (width + 1) + column.

    The spare column keeps the last column of a row and the first of the next from being consecutive.
    """

    keys: Array
    rows: int
    width: int

    def split(self) -> tuple[Array, Array]:
        row = self.keys // (self.width + 1)
        return row, self.keys - row * (self.width + 1)

    def bounds(self) -> Array:
        """Row i owns keys[bounds[i]:bounds[i+1]]."""
        return np.searchsorted(self.keys, np.arange(self.rows + 1) * (self.width + 1))


@dataclasses.dataclass(frozen=True)
class _Runs:
    """Runs, one an element, ordered by row. A singleton that no stride took has stride 0."""

    row: Array
    start: Array
    stride: Array
    count: Array


def recover(
    indptr: Any, indices: Any, shape: tuple[int, int], *, max_components: int = 64
) -> list[tuple[int, Array, Array]]:
    """Recover the affine components of a CSR boolean structure.

    Args:
      indptr: [rows + 1] integers; row i owns indices[indptr[i]:indptr[i+1]].
      indices: columns; unsorted within a row is fine, duplicates count once.
      shape: (rows, columns).
      max_components: how many components (and so how many runs in a row) are acceptable.

    Returns:
      A list of (stride, start, count), ordered by stride; `start` and `count` are int32 [rows]. In row i a component
      has the columns `start[i] + stride * t` for `0 <= t < count[i]`, and `start[i] == 0` where `count[i] == 0`.
      Components are disjoint and together exactly the input.

    Raises:
      ArgumentError: the arrays are not a CSR structure of this shape, or `max_components` is no positive int.
      IrregularPatternError: a row, or all rows together, need more than `max_components`.

    >>> recover([0, 1, 3, 6], [0, 0, 1, 0, 1, 2], (3, 3))
    [(1, array([0, 0, 0], dtype=int32), array([1, 2, 3], dtype=int32))]
    """
    if isinstance(max_components, bool) or not isinstance(max_components, (int, np.integer)) or max_components < 1:
        raise ArgumentError(f"max_components must be an int of at least 1, but {max_components!r} was given")
    columns = _read(indptr, indices, shape)
    if not columns.keys.size:
        return []
    distinct, members, shift = _distinct_rows(columns)
    runs, needed = _peel_best(distinct, max_components)
    if needed > max_components:
        _refuse(distinct, members, runs, needed, max_components)
    runs = _spread(runs, members, shift)
    strides, slot = _place(runs, columns.width)
    found = np.zeros((2, len(strides), columns.rows), np.int32)
    found[:, slot, runs.row] = runs.start, runs.count
    components = [(s if count.max() > 1 else 1, start, count) for s, start, count in zip(strides, *found, strict=True)]
    return sorted(components, key=lambda component: component[0])


def _read(indptr: Any, indices: Any, shape: tuple[int, int]) -> _Columns:
    """Check a CSR structure; sort its columns and drop duplicates."""
    rows, width = (int(n) for n in shape)
    if rows < 0 or not 0 <= width < 2**31:
        raise ArgumentError(f"shape must be (rows, columns), neither negative, columns below 2**31, got {shape}")
    ptr, col = np.asarray(indptr), np.asarray(indices)
    for name, array in (("indptr", ptr), ("indices", col)):
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ArgumentError(f"{name} must be a 1-D integer array, got shape {array.shape}, dtype {array.dtype}")
    ptr = ptr.astype(np.int64)
    if ptr.size != rows + 1:
        raise ArgumentError(f"indptr must have length rows + 1 = {rows + 1} for shape {(rows, width)}, got {ptr.size}")
    if ptr[0] != 0 or ptr[-1] != col.size:
        raise ArgumentError(f"indptr must go from 0 to len(indices) = {col.size}, got {int(ptr[0])} to {int(ptr[-1])}")
    lengths = np.diff(ptr)
    if (lengths < 0).any():
        raise ArgumentError(f"indptr must not decrease, but does after row {int(np.argmax(lengths < 0))}")
    if col.size and (col.min() < 0 or col.max() >= width):
        raise ArgumentError(f"indices must be in [0, {width}), got values from {int(col.min())} to {int(col.max())}")
    keys = np.repeat(np.arange(rows) * (width + 1), lengths)
    keys += col.astype(np.int64, copy=False)
    return _Columns(keys if (keys[1:] > keys[:-1]).all() else np.unique(keys), rows, width)


def _distinct_rows(columns: _Columns) -> tuple[_Columns, Array, Array]:
    """Keep one of each set of rows that are translations of each other.

    Returns the distinct rows, and for every row the distinct row it is (-1 for an empty row) and how far it is shifted.
    """
    length = np.diff(columns.bounds())
    full = np.flatnonzero(length)
    length = length[full]
    begin = np.cumsum(length) - length
    offset = columns.keys - np.repeat(columns.keys[begin], length)
    position = np.arange(offset.size) - np.repeat(begin, length)
    # A random linear hash of the offsets. No two different rows may share one, so every row is compared below.
    weights = np.random.default_rng(0).integers(1, 2**63, size=int(length.max()), dtype=np.int64)
    hashes = np.add.reduceat(offset * weights[position], begin) ^ (length * 0x9E3779B97F4A7C1)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    position += np.repeat(begin[first][inverse], length)
    if (length[first][inverse] != length).any() or (offset[position] != offset).any():
        first = inverse = np.arange(full.size)
    members = np.full(columns.rows, -1)
    members[full] = inverse
    head = columns.keys[begin] % (columns.width + 1)
    shift = np.zeros(columns.rows, np.int64)
    shift[full] = head - head[first][inverse]
    return _select(columns, full[first]), members, shift


def _select(columns: _Columns, rows: Array) -> _Columns:
    """The given rows, renumbered 0, 1, ... in the order given."""
    bounds = columns.bounds()
    length = np.diff(bounds)[rows]
    index = np.arange(length.sum()) + np.repeat(bounds[rows] - (np.cumsum(length) - length), length)
    moved = np.repeat((np.arange(rows.size) - rows) * (columns.width + 1), length)
    return _Columns(columns.keys[index] + moved, rows.size, columns.width)


def _peel(columns: _Columns, step: Step) -> tuple[_Runs, _Columns]:
    """Take out every maximal run of the step's stride that is long enough; returns the runs and what is left.

    In the order (row, residue, column // stride) the elements of such a run are consecutive integers.
    """
    stride, least = step
    high = (columns.width - 1) // stride + 2
    keys = columns.keys
    if stride > 1:
        row, col = columns.split()
        quotient = col // stride
        keys = np.sort((row * stride + (col - quotient * stride)) * high + quotient)
    first = np.flatnonzero(np.diff(keys, prepend=-2) != 1)
    count = np.diff(first, append=keys.size)
    long = count >= least
    rest = keys[:0] if long.all() else keys[np.repeat(~long, count)]
    if stride > 1 and rest.size:
        group, quotient = np.divmod(rest, high)
        rest = np.sort(group // stride * (columns.width + 1) + group % stride + quotient * stride)
    group, quotient = np.divmod(keys[first[long]], high)
    row, residue = np.divmod(group, stride)
    runs = _Runs(row, residue + quotient * stride, np.full(row.size, stride), count[long])
    return runs, dataclasses.replace(columns, keys=rest)


def _needs(runs: Sequence[Array]) -> tuple[int, int]:
    """(components, number of runs) from the runs per row of each stride, the singletons last."""
    total = np.sum(runs, axis=0)
    return max(sum(int(per_row.max()) for per_row in runs[:-1]), int(total.max())), int(total.sum())


class _Search:
    """Greedy search for the sequence of strides that needs fewest components, on a few rows."""

    def __init__(self, columns: _Columns, spent: int):
        self.columns, self.spent = columns, spent
        self._prefixes: dict[tuple[Step, ...], tuple[tuple[Array, ...], _Columns]] = {(): ((), columns)}
        heads = _peel(columns, (1, 1))[0]
        heads = dataclasses.replace(columns, keys=heads.row * (columns.width + 1) + heads.start)
        found = [_differences(columns, 1, 4), *(_differences(heads, lag, 2) for lag in (1, 2, 3))]
        self._usual = {stride for strides in found for stride in strides}

    def rest(self, steps: tuple[Step, ...]) -> tuple[tuple[Array, ...], _Columns]:
        """Runs per row of each step, and what all of them leave; prefixes are remembered."""
        if steps not in self._prefixes:
            runs, columns = self.rest(steps[:-1])
            self.spent += columns.keys.size + 1000  # a call costs time whatever its size
            found, columns = _peel(columns, steps[-1])
            self._prefixes[steps] = ((*runs, np.bincount(found.row, minlength=columns.rows)), columns)
        return self._prefixes[steps]

    def needs(self, steps: tuple[Step, ...]) -> tuple[int, int]:
        runs, columns = self.rest(steps)
        return _needs([*runs, np.diff(columns.bounds())])

    def run(self) -> tuple[tuple[Step, ...], int]:
        """The best steps and how many components they need."""
        whole = tuple((stride, 2) for stride in _whole_row_strides(self.columns))
        best = min(((), whole), key=self.needs)
        score = self.needs(best)
        while score[0] > 1 and self.spent < _EFFORT:
            candidate = self._extend(best)
            if not candidate or self.needs(candidate) >= score:
                break
            best, score = candidate, self.needs(candidate)
            self._prefixes = {steps: kept for steps, kept in self._prefixes.items() if steps == best[: len(steps)]}
        return self._tidy(min(best, ((1, 2),), key=lambda steps: self.needs(steps)[0]))  # stretches are the bound

    def _extend(self, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        """The best insertion of one more stride; of equals the one that peels small strides first."""
        used = [stride for stride, _ in steps]
        scores = {}
        for stride in self._candidates(steps):
            order = sorted([*used, stride])
            for at in sorted({0, order.index(stride), len(used)}):
                for least in (2, 3):  # pairs may be better left to the strides that follow, or as singletons
                    candidate = (*steps[:at], (stride, least), *steps[at:])
                    components, runs = self.needs(candidate)
                    if components == 1:
                        return candidate
                    scores[candidate] = (components, [*used[:at], stride, *used[at:]] != order, least, runs, stride)
        return min(scores, key=scores.__getitem__, default=())

    def _candidates(self, steps: tuple[Step, ...]) -> list[int]:
        """Strides worth trying: frequent differences of columns, and of the places where contiguous stretches begin."""
        used = [stride for stride, _ in steps]
        rest = self.rest(steps)[1]
        gaps = _differences(rest, 1, 5)
        found = self._usual.union(gaps, *(_differences(rest, lag, 1) for lag in range(2, _LAGS + 1)))
        # Where two strides overlap, what one of them leaves of the other repeats with their common multiple.
        pool = {*used[:4], *gaps[:4]}
        found.update(math.lcm(a, b) for a in pool for b in pool)
        return sorted(stride for stride in found if stride < self.columns.width and stride not in used)

    def _tidy(self, steps: tuple[Step, ...]) -> tuple[tuple[Step, ...], int]:
        """Drop strides that save (almost) nothing."""
        score = self.needs(steps)
        for step in sorted(steps, reverse=True):
            fewer = tuple(other for other in steps if other != step)
            found = self.needs(fewer)
            if found[0] <= score[0] and found[1] <= 1.05 * score[1]:
                steps, score = fewer, found
        return steps, score[0]


def _whole_row_strides(columns: _Columns) -> list[int]:
    """The strides of the rows that are one run of at least three elements."""
    row, col = columns.split()
    gap = col[2:] - col[1:-1]
    inside = row[2:] == row[:-2]
    bent = inside & (gap != col[1:-1] - col[:-2])
    straight = inside & (np.bincount(row[2:][bent], minlength=columns.rows) == 0)[row[2:]]
    return np.unique(gap[straight]).tolist()


def _differences(columns: _Columns, lag: int, most: int) -> list[int]:
    """The commonest differences between a row's columns and their lag-th successors, commonest first."""
    row, col = columns.split()
    values, counts = np.unique((col[lag:] - col[:-lag])[row[lag:] == row[:-lag]], return_counts=True)
    return values[np.argsort(-counts, kind="stable")[:most]].tolist()


def _peel_best(columns: _Columns, limit: int) -> tuple[_Runs, int]:
    """Search on a sample of rows; where the sample was too kind, add the rows that say so and search again.

    Returns all runs of all rows, peeled by the best steps, and how many components they need.
    """
    order = np.random.default_rng(0).permutation(columns.rows)
    few = int(np.searchsorted(np.cumsum(np.diff(columns.bounds())[order]), _SAMPLE_ELEMENTS))
    sample = set(order[: min(max(8, few), _SAMPLE_ROWS)].tolist())
    spent, tried = 0, []
    for _ in range(_ROUNDS):
        search = _Search(_select(columns, np.array(sorted(sample))), spent)
        steps, promised = search.run()
        spent = search.spent
        parts, rest = [], columns
        for step in steps:
            runs, rest = _peel(rest, step)
            parts.append(runs)
        parts.append(_Runs(*rest.split(), np.zeros_like(rest.keys), np.ones_like(rest.keys)))
        per_row = [np.bincount(runs.row, minlength=columns.rows) for runs in parts]
        score = _needs(per_row)
        tried.append((score, parts))
        worst = {int(np.argmax(runs)) for runs in [*per_row, np.sum(per_row, axis=0)]}
        if score[0] <= promised or worst <= sample or promised > limit:
            break
        sample |= worst
    score, parts = min(tried, key=lambda one: one[0])
    return _Runs(*(np.concatenate([getattr(runs, name) for runs in parts]) for name in _Runs.__annotations__)), score[0]


def _refuse(distinct: _Columns, members: Array, runs: _Runs, needed: int, limit: int) -> None:
    """Raise for the worst row, looked at alone; or for the matrix, where no row alone is to blame."""
    alone = {
        int(row): _Search(_select(distinct, np.array([row])), _EFFORT - _EFFORT // 8).run()[1]
        for row in np.argsort(-np.bincount(runs.row), kind="stable")[:4]
    }
    worst = max(alone, key=alone.__getitem__)
    if alone[worst] > limit:
        row, needed = int(np.argmax(members == worst)), alone[worst]
        what = f"row {row} is not regular: it needs {needed} arithmetic progressions, more than"
    else:
        row, what = None, f"the rows are regular one by one but not together: they need {needed} components, more than"
    advice = "for an arbitrary mask use dense masked attention, or raise max_components."
    message = f"{what} max_components={limit}. SPLAT serves patterns whose rows are a few progressions; {advice}"
    raise IrregularPatternError(message, row=row, runs=needed)


def _spread(runs: _Runs, members: Array, shift: Array) -> _Runs:
    """The runs of all rows from those of the distinct rows, ordered by row and start."""
    order = np.lexsort((runs.start, runs.row))
    per_row = np.append(np.bincount(runs.row), 0)  # the last one is for the empty rows, members == -1
    length = per_row[members]
    before = (np.cumsum(per_row) - per_row)[members] - (np.cumsum(length) - length)
    index = order[np.repeat(before, length) + np.arange(length.sum())]
    row, start = np.repeat([np.arange(members.size), shift], length, axis=1)
    return _Runs(row, start + runs.start[index], runs.stride[index], runs.count[index])


def _place(runs: _Runs, width: int) -> tuple[list[int], Array]:
    """Give every run a component. Returns the components' strides, and the component of each run.

    Consecutive rows whose runs have the same strides from left to right form a segment, and in a segment the k-th run
    stays in one component. Where segments meet, each run goes where the last run lay closest. The sweeps start at the
    longest of the segments that use most components, so that rows at the edges join what they are the edge of.
    """
    length = np.bincount(runs.row)
    peeled = [int(stride) for stride in np.unique(runs.stride) if stride]
    strides = [s for s in peeled for _ in range(np.bincount(runs.row[runs.stride == s]).max())]
    main = max(peeled, key=lambda s: int(runs.count[runs.stride == s].sum()), default=1)
    strides = sorted(strides + [main] * (int(length.max()) - len(strides)))
    slot = np.zeros(runs.row.size, np.int64)
    if len(strides) == 1:
        return strides, slot
    bounds, lengths = _segments(runs.stride, length[length > 0])
    seed = int(np.lexsort((np.diff(bounds) // lengths, lengths))[-1])
    stop = runs.start + (runs.count - 1) * runs.stride
    for direction in (1, -1):
        last = np.full((2, len(strides)), -1)
        for at in range(seed, lengths.size if direction > 0 else -1, direction):
            low, high, n = int(bounds[at]), int(bounds[at + 1]), int(lengths[at])
            near, far = [slice(low, low + n), slice(high - n, high)][::direction]
            chosen = _nearest(np.stack([runs.start[near], stop[near]]), runs.stride[near], strides, last, width)
            slot[low:high] = np.tile(chosen, (high - low) // n)
            last[:, slot[far]] = runs.start[far], stop[far]
    return strides, slot


def _segments(stride: Array, length: Array) -> tuple[Array, Array]:
    """Bounds (as run numbers) of the segments, and how many runs each of their rows has; `length` has no zeros."""
    begin = np.cumsum(length) - length
    longer = np.diff(length, prepend=0) != 0
    above = np.arange(stride.size) - np.repeat(np.where(longer, 0, length), length)
    first = np.flatnonzero(longer | np.logical_or.reduceat(stride != stride[above], begin))
    return np.append(begin[first], stride.size), length[first]


def _nearest(place: Array, stride: Array, strides: Sequence[int], last: Array, width: int) -> Array:
    """Match a row's runs to components, closest pairs first; `place` and `last` are [first/last column, run]."""
    cost = np.abs(place[:, :, None] - last[:, None, :]).sum(axis=0)  # [runs, components]
    cost[:, last[0] < 0] = width
    chosen = np.full(stride.size, -1)
    free = set(range(len(strides)))
    # A singleton may go anywhere but must leave a component for each run that has a stride.
    spare = {s: strides.count(s) - int((stride == s).sum()) for s in strides}
    for pair in np.argsort(cost, axis=None, kind="stable"):
        run, to = divmod(int(pair), len(strides))
        fits = stride[run] == strides[to] or (stride[run] == 0 and spare[strides[to]] > 0)
        if fits and chosen[run] < 0 and to in free:
            chosen[run] = to
            free.remove(to)
            spare[strides[to]] -= int(stride[run] == 0)
    return chosen
