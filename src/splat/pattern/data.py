"""Patterns given as data: `from_mask`, `from_csr`, `from_runs`, and the numeric transposition they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from splat.errors import IrregularPatternError, PatternError
from splat.pattern.algebra import MAX_COMPONENTS, prune, union
from splat.pattern.core import (
    MAX_LENGTH,
    Axis,
    Frozen,
    Pattern,
    Run,
    array_namespace,
    check_int,
    decode_array,
    is_runtime_array,
)
from splat.pattern.recover import recover


def make_run(stride: int, start: np.ndarray, count: np.ndarray) -> Run:
    """A run from numbers, with the grouping under which lines share `start mod stride`: 1, `stride` or None.

    Lines without elements get a start of the residue that their group has: set algebra counts on it.
    """
    here = np.flatnonzero(count > 0)
    if stride == 1 or not here.size:
        return Run(stride, start, count, 1)
    empty = np.flatnonzero(count <= 0)
    start = start.copy()
    residue = start[here] % stride
    if (residue == residue[0]).all():
        start[empty] = residue[0]
        return Run(stride, start, count, 1)
    drift = (start[here] - here) % stride
    if (drift == drift[0]).all():
        start[empty] = (empty + drift[0]) % stride
        return Run(stride, start, count, stride)
    return Run(stride, start, count, None)


@dataclasses.dataclass(frozen=True, repr=False)
class Table(Pattern):
    """Given runs: `start` and `count` int32 [components, rows]; one stride a component; disjoint."""

    strides: tuple[int, ...]
    start: Frozen
    count: Frozen
    kv_len: int | None = None

    def _check(self, rows: Axis, cols: Axis) -> None:
        """Raises PatternError where the table was made for other lengths."""
        for given, axis, name in ((self.start.array.shape[1], rows, "query"), (self.kv_len, cols, "key")):
            if given is None or not axis.is_static:
                continue
            if axis.start < 0 or axis.stop > given or (axis.start == 0 and axis.length != given):
                where = f"{axis.length}" if axis.start == 0 else f"positions {axis.start} to {axis.stop}"
                first = axis.length if name == "query" and axis.start == 0 and axis.length < given else None
                raise PatternError(_misfit(f"{given} {name} positions", where, first))

    @cached_property
    def _whole(self) -> list[Run]:
        return prune([make_run(*one) for one in zip(self.strides, self.start.array, self.count.array, strict=True)])

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        self._check(rows, cols)
        return prune([_lines(run, rows).clip(cols.start, cols.stop) for run in self._whole])

    @cached_property
    def _transposed(self) -> list[Run]:
        start, count = self.start.array, self.count.array
        runs = [Run(s, start[n], count[n], None) for n, s in enumerate(self.strides)]
        stop = self.kv_len
        if stop is None:
            stop = max(
                (int((r.start + r.stride * (r.count - 1))[r.count > 0].max(initial=-1)) for r in runs), default=-1
            )
            stop += 1
        return transpose_runs([r.clip(0, stop) for r in runs], stop)

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        self._check(rows, cols)
        return prune([_lines(run, cols).clip(rows.start, rows.stop) for run in self._transposed])

    def __repr__(self) -> str:
        size = "" if self.kv_len is None else f", kv_len={self.kv_len}"
        return f"from_runs({self.start!r}, {list(self.strides)!r}, {self.count!r}{size})"


def _lines(run: Run, axis: Axis) -> Run:
    """The run's lines at the positions of the axis; those that it does not know have no elements."""
    at, inside = axis.inside(run.start.shape[0])
    xp = array_namespace(axis.start)
    start, count = xp.asarray(run.start)[at], xp.asarray(run.count)[at]
    if inside is not None:
        count = xp.where(inside, count, 0)
        if run.line_step != 1:
            start = start + (axis.positions - at)  # of the residue that the line's group has
    return Run(run.stride, start, count, run.line_step)


def _misfit(made_for: str, used_with: str, first: int | None) -> str:
    message = (
        f"this pattern was made from data for {made_for}, but is used with {used_with}. Build it again for these "
        "lengths, or describe it with closed-form patterns, which serve all lengths."
    )
    if first is None:
        return message
    return (
        f"{message} A part that begins at position 0 looks like a wrong length: build it from the first {first} rows."
    )


def transpose_runs(runs: Sequence[Run], num_cross: int) -> list[Run]:
    """Runs of lines for every cross position in `[0, num_cross)`; time and memory O(lines + result).

    Within one residue class of a component, lines follow one another; a transposed run of column x starts at a line
    that has x while the line before has not, and ends at one that has x while the next has not. The starts and the
    ends, each sorted by (column, line), pair up.
    """
    out: list[Run] = []
    for run in runs:
        out += _transpose_run(run, num_cross)
    if len(out) > MAX_COMPONENTS:
        raise IrregularPatternError(
            f"seen from its columns this pattern needs {len(out)} affine components, more than {MAX_COMPONENTS}: "
            "gradients cannot be planned for it. Use a pattern whose columns are regular too.",
            runs=len(out),
        )
    return out


def _transpose_run(run: Run, num_cross: int) -> list[Run]:
    line = np.flatnonzero(np.asarray(run.count) > 0)
    if not line.size:
        return []
    start, count = np.asarray(run.start)[line].astype(np.int64), np.asarray(run.count)[line].astype(np.int64)
    residue, a = start % run.stride, start // run.stride
    b = a + count
    order = np.lexsort((line, residue))
    line, residue, a, b = line[order], residue[order], a[order], b[order]
    gap = np.diff(line)
    same = residue[1:] == residue[:-1]
    step = int(np.bincount(gap[same]).argmax()) if same.any() else 1
    chained = same & (gap == step)  # line n+1 continues line n

    def edges(other: np.ndarray, linked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(column, line) of the elements that the neighbouring line does not have, sorted."""
        oa, ob = np.where(linked, a[other], b), np.where(linked, b[other], b)
        left, right = np.minimum(b, oa), np.maximum(a, ob)
        first = np.concatenate([a, right])
        sizes = np.maximum(np.concatenate([left - a, b - right]), 0)
        if sizes.sum() > 64 * (num_cross + line.size) + 4096:
            raise IrregularPatternError(
                "seen from its columns this pattern is not regular (its columns would need more than 64 runs each): "
                "gradients cannot be planned for it. Use a pattern whose columns are regular too.",
                runs=int(sizes.sum() // max(num_cross, 1)),
            )
        which = np.repeat(np.tile(np.arange(line.size), 2), sizes)
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        column = residue[which] + run.stride * (np.repeat(first, sizes) + within)
        order = np.lexsort((line[which], column))
        return column[order], line[which][order]

    index = np.arange(line.size)
    column, first = edges(np.maximum(index - 1, 0), np.concatenate([[False], chained]))
    _, last = edges(np.minimum(index + 1, line.size - 1), np.concatenate([chained, [False]]))
    kth = np.arange(column.size) - np.searchsorted(column, column, side="left")
    out = []
    for k in range(int(kth.max()) + 1):
        here = kth == k
        starts, counts = np.zeros(num_cross, np.int32), np.zeros(num_cross, np.int32)
        starts[column[here]] = first[here]
        counts[column[here]] = (last[here] - first[here]) // step + 1
        out.append(make_run(step if int(counts.max()) > 1 else 1, starts, counts))
    return out


def _as_numpy(name: str, values: Any) -> np.ndarray:
    if is_runtime_array(values):
        try:
            return np.asarray(values)
        except Exception as error:
            raise PatternError(
                f"{name} needs values that are known now, but a traced JAX array was given. Build the pattern outside "
                "jit from a NumPy array; for run-time documents use segments(ids)."
            ) from error
    if isinstance(values, str):
        return decode_array(values)
    try:
        return np.asarray(values)
    except ValueError as error:
        raise PatternError(f"{name} must be an array, but NumPy makes none of what was given: {error}") from None


def from_mask(mask: Any, *, max_components: int = 64) -> Pattern:
    """The pattern of a mask, bool [q_len, kv_len] (True = attend): its affine components are recovered.

    Raises:
      IrregularPatternError: a row needs more than `max_components` runs; it says which row and how many.
      PatternError: not a 2-D boolean array.
    """
    array = _as_numpy("from_mask", mask)
    if array.ndim != 2 or array.dtype != bool:
        raise PatternError(
            f"from_mask: mask must be bool [q_len, kv_len], but {array.dtype}{list(array.shape)} was given. For an "
            "additive mask pass `mask == 0`; for one pattern per head use per_head([...])."
        )
    rows, cols = np.nonzero(array)
    indptr = np.searchsorted(rows, np.arange(array.shape[0] + 1))
    return _recovered(indptr, cols, array.shape, max_components)


def from_csr(indptr: Any, indices: Any, shape: tuple[int, int], *, max_components: int = 64) -> Pattern:
    """The pattern of a CSR structure (`indptr` [q_len + 1], `indices` [nnz]), as SciPy has it.

    Raises:
      IrregularPatternError: a row needs more than `max_components` runs; it says which row and how many.
    """
    indptr, indices = _as_numpy("from_csr", indptr), _as_numpy("from_csr", indices)
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise PatternError(f"from_csr: shape must be (q_len, kv_len), but {shape!r} was given")
    sizes = tuple(check_int("from_csr", f"shape[{n}]", size, 0) for n, size in enumerate(shape))
    return _recovered(indptr, indices, sizes, max_components)


def _recovered(indptr: np.ndarray, indices: np.ndarray, shape: tuple[int, ...], max_components: int) -> Pattern:
    found = recover(indptr, indices, (shape[0], shape[1]), max_components=max_components)
    starts = np.array([start for _, start, _ in found], np.int32).reshape(len(found), shape[0])
    counts = np.array([count for _, _, count in found], np.int32).reshape(len(found), shape[0])
    return Table(tuple(stride for stride, _, _ in found), Frozen(starts), Frozen(counts), int(shape[1]))


def _clipped(stride: int, start: np.ndarray, count: np.ndarray, limit: int) -> Run:
    """The elements in `[0, limit)` of runs whose numbers may be of any size, as int32."""
    if start.size and int(start.min()) < -(2**31):
        raise PatternError(f"from_runs: start must be at least -2**31, but {int(start.min())} was given")
    stride = min(stride, 2**31)  # a longer one has no second element, either
    start, count = (np.minimum(x, 2**61) if x.dtype.itemsize == 8 else x for x in (start, count))
    start, count = start.astype(np.int64), np.clip(count.astype(np.int64), 0, 2**31)
    run = Run(stride, start, count).clip(0, limit)
    start = np.where(run.count > 0, run.start, 0).astype(np.int32)
    return make_run(stride if stride < MAX_LENGTH else 1, start, run.count.astype(np.int32))


def from_runs(start: Any, stride: Any, count: Any, *, kv_len: int | None = None) -> Pattern:
    """Rows as given progressions: row i attends to `start[i] + stride*t` for `0 <= t < count[i]`.

    Args:
      start, count: int [rows], or int [components, rows] for several runs a row.
      stride: a positive int; or one per component; or, with `start` of rank 1, one per row.
      kv_len: the number of key positions the runs were made for, checked in use; None serves any.

    Elements outside `[0, kv_len)` are cut off, and a pair named by several runs counts once.
    """
    start, count = _as_numpy("from_runs", start), _as_numpy("from_runs", count)
    stride = np.asarray(stride)
    for name, array in (("start", start), ("count", count), ("stride", stride)):
        if array.size and array.dtype.kind not in "iu":
            raise PatternError(f"from_runs: {name} must be integers, but {array.dtype} was given")
    if start.shape != count.shape or start.ndim not in (1, 2):
        raise PatternError(
            f"from_runs: start and count must have one shape, [rows] or [components, rows], but {list(start.shape)} "
            f"and {list(count.shape)} were given"
        )
    if stride.size and int(stride.min()) < 1:
        raise PatternError(f"from_runs: stride must be positive, but {int(stride.min())} was given")
    rows = start.shape[-1]
    if start.ndim == 1 and stride.ndim == 1 and stride.shape != (1,):
        if stride.shape != start.shape:
            raise PatternError(f"from_runs: {stride.shape[0]} strides were given for {rows} rows")
        stride = np.where(count > 1, stride, 1)  # one column is in any progression
        distinct = np.unique(stride[count > 0])
        if distinct.size > MAX_COMPONENTS:
            raise IrregularPatternError(
                f"from_runs: {distinct.size} different strides were given, more than {MAX_COMPONENTS} affine "
                "components can have. Use dense masked attention for it.",
                runs=int(distinct.size),
            )
        count = np.where(stride == distinct[:, None], count, 0)
        start, stride = np.broadcast_to(start, count.shape), distinct
    components = 1 if start.ndim == 1 else start.shape[0]
    start, count = start.reshape(components, rows), count.reshape(components, rows)
    if stride.ndim > 1 or (stride.ndim == 1 and stride.size not in (1, start.shape[0])):
        raise PatternError(f"from_runs: {stride.size} strides were given for {start.shape[0]} components")
    strides = np.broadcast_to(stride, start.shape[:1]).tolist()
    kv_len = None if kv_len is None else check_int("from_runs", "kv_len", kv_len, 0)
    limit = MAX_LENGTH if kv_len is None else kv_len
    given: list[Run] = []
    runs: list[Run] = []
    for step, first, number in zip(strides, start, count, strict=True):
        run = _clipped(int(step), first, number, limit)
        given.append(run)
        runs = union(runs, prune([run])) if runs else [run]
    if sum(int(r.count.sum()) for r in given) == sum(int(r.count.sum()) for r in runs):
        runs = given  # disjoint as they are: keep them so
    starts = np.array([r.start for r in runs], np.int32).reshape(len(runs), rows)
    counts = np.array([r.count for r in runs], np.int32).reshape(len(runs), rows)
    starts = np.where(counts > 0, starts, 0)
    return Table(tuple(r.stride for r in runs), Frozen(starts), Frozen(counts), kv_len)
