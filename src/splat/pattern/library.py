"""The vocabulary: every primitive pattern, its exact meaning, and its runs in closed form.

i is a row (query position), j a column (key position), both absolute; `//` floors, `mod` is never negative.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from splat.errors import IrregularPatternError, PatternError
from splat.pattern.algebra import MAX_COMPONENTS, everything, union
from splat.pattern.core import (
    MAX_LENGTH,
    Array,
    Axis,
    Frozen,
    Pattern,
    Run,
    array_namespace,
    check_int,
    check_positions,
    is_runtime_array,
)


@dataclasses.dataclass(frozen=True, repr=False)
class _Primitive(Pattern):
    """A named constructor: `repr` is the call with the arguments that differ from their defaults."""

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{_CONSTRUCTORS[name]}({', '.join(self._arguments())})"

    def _arguments(self) -> list[str]:
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                shown.append(repr(value))
            elif value != field.default:
                shown.append(f"{field.name}={value!r}")
        return shown


def _between(lines: Axis, cross: Axis, first: Array, stop: Array, line_step: int = 1) -> list[Run]:
    """The run `[first, stop)` of every line, clipped to `cross`."""
    xp = array_namespace(lines.start, cross.start, first, stop)
    start = xp.maximum(first, cross.start)
    count = xp.maximum(xp.minimum(stop, cross.stop) - start, 0)

    def spread(values: Array) -> Array:
        return xp.broadcast_to(xp.asarray(values, dtype=np.int32), (lines.length,))

    return [Run(1, spread(start), spread(count), line_step)]


class _Symmetric(_Primitive):
    """Equal to its own transpose."""

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        return self.runs(cols, rows)


@dataclasses.dataclass(frozen=True, repr=False)
class Full(_Symmetric):
    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        return [everything(rows, cols)]


@dataclasses.dataclass(frozen=True, repr=False)
class Causal(_Primitive):
    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        return _between(rows, cols, cols.start, rows.positions + 1)

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        return _between(cols, rows, cols.positions, rows.stop)


@dataclasses.dataclass(frozen=True, repr=False)
class Window(_Primitive):
    left: int
    right: int

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        xp = array_namespace(rows.start)
        # No position lies past the last of these, and the sum fits in 32 bits.
        last = xp.minimum(rows.positions, MAX_LENGTH - 1 - self.right) + self.right
        return _between(rows, cols, rows.positions - self.left, last + 1)

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        return Window(self.right, self.left).runs(cols, rows)

    def _arguments(self) -> list[str]:
        return [str(self.left)] if self.left == self.right else [str(self.left), str(self.right)]


@dataclasses.dataclass(frozen=True, repr=False)
class SlidingWindow(_Primitive):
    n: int

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        return Window(self.n - 1, 0).runs(rows, cols)

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        return Window(0, self.n - 1).runs(cols, rows)


@dataclasses.dataclass(frozen=True, repr=False)
class DilatedWindow(_Primitive):
    left: int
    right: int
    dilation: int

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        if self.dilation == 1:
            return Window(self.left, self.right).runs(rows, cols)
        xp = array_namespace(rows.start, cols.start)
        start = rows.positions - self.left * self.dilation
        count = xp.zeros(rows.length, dtype=np.int32) + np.int32(self.left + self.right + 1)
        return [Run(self.dilation, start, count, self.dilation).clip(cols.start, cols.stop)]

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        return DilatedWindow(self.right, self.left, self.dilation).runs(cols, rows)


def _progression(lines: Axis, cross: Axis, residue: Array, stride: int, line_step: int) -> Run:
    """All positions of `cross` that equal `residue` modulo `stride`."""
    xp = array_namespace(lines.start, cross.start, residue)
    zero = xp.zeros(lines.length, dtype=np.int32)
    start = zero + cross.start + (residue - cross.start) % stride
    count = xp.maximum(-((start - cross.stop) // stride), 0)
    return Run(stride, start, count, line_step)


@dataclasses.dataclass(frozen=True, repr=False)
class Strided(_Symmetric):
    stride: int

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        return [_progression(rows, cols, rows.positions % self.stride, self.stride, self.stride)]


@dataclasses.dataclass(frozen=True, repr=False)
class LatticeColumns(_Primitive):
    stride: int
    offset: int = 0

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        return [_progression(rows, cols, np.int32(self.offset % self.stride), self.stride, 1)]

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        xp = array_namespace(cols.start, rows.start)
        run = everything(cols, rows)
        here = (cols.positions - self.offset) % self.stride == 0
        return [Run(1, run.start, xp.where(here, run.count, 0), self.stride)]


@dataclasses.dataclass(frozen=True, repr=False)
class Blocked(_Primitive):
    block: int
    before: int = 0
    after: int = 0

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        block_row = rows.positions // self.block
        # No position lies past the last of these blocks, and their number times the block's size fits in 32 bits.
        last = (MAX_LENGTH - 1) // self.block
        xp = array_namespace(block_row)
        stop = (xp.minimum(block_row + self.after, last) + 1) * self.block
        return _between(rows, cols, (block_row - self.before) * self.block, stop)

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        return Blocked(self.block, self.after, self.before).runs(cols, rows)


@dataclasses.dataclass(frozen=True, repr=False)
class Sink(_Primitive):
    n: int

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        return _between(rows, cols, cols.start, self.n)

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        return GlobalRows(self.n).runs(cols, rows)


@dataclasses.dataclass(frozen=True, repr=False)
class GlobalRows(_Primitive):
    n: int

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        xp = array_namespace(rows.start, cols.start)
        run = everything(rows, cols)
        return [Run(1, run.start, xp.where(rows.positions < self.n, run.count, 0))]

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        return Sink(self.n).runs(cols, rows)


@dataclasses.dataclass(frozen=True, repr=False)
class GlobalTokens(_Symmetric):
    n: int

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        return union(Sink(self.n).runs(rows, cols), GlobalRows(self.n).runs(rows, cols))


def _at(numbers: Array, axis: Axis) -> Array:
    """The numbers [positions] at the positions of the axis; 0 where a run-time axis leaves them."""
    at, inside = axis.inside(numbers.shape[0])
    xp = array_namespace(axis.start)
    return numbers[at] if inside is None else xp.where(inside, xp.asarray(numbers)[at], 0)


@dataclasses.dataclass(frozen=True, repr=False)
class Segments(_Symmetric):
    """Same segment id. Static ids may recur anywhere; run-time ids must be contiguous (each id one stretch)."""

    ids: Frozen

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        ids = self.ids.array
        remedy = "Give one id per position (a negative id marks padding)."
        check_positions("segments: ids name", ids.shape[0], (rows, cols), remedy)
        if self.ids.is_static:
            return self._static_runs(rows, cols, ids)
        xp = array_namespace(ids)
        change = xp.concat([xp.zeros(1, dtype=np.int32), (ids[1:] != ids[:-1]).astype(np.int32)])
        order = xp.cumsum(change)
        first = xp.searchsorted(order, order, side="left").astype(np.int32)
        stop = xp.searchsorted(order, order, side="right").astype(np.int32)
        return _between(rows, cols, _at(first, rows), _at(xp.where(ids >= 0, stop, 0), rows))

    def _static_runs(self, rows: Axis, cols: Axis, ids: np.ndarray) -> list[Run]:
        first = _starts_of_stretches(ids).astype(np.int32)
        stop = np.append(first[1:], np.int32(ids.size))
        stretch = np.repeat(np.arange(first.size), stop - first)  # of each position
        own = ids[first]
        met = own >= 0
        if cols.is_static:
            met &= (stop > cols.start) & (first < cols.stop)
        seen = np.flatnonzero(met)
        seen = seen[np.argsort(own[seen], kind="stable")]
        # Those of one id are neighbours in `seen`: from `begin` on, `count` of them.
        begin = np.searchsorted(own[seen], own, side="left")
        count = np.searchsorted(own[seen], own, side="right") - begin
        of_row = count[stretch[rows.start : rows.stop] if rows.is_static else stretch]
        most = int(of_row.max(initial=0))
        if most > MAX_COMPONENTS:
            row = int(np.argmax(of_row))
            position = row + (rows.start if rows.is_static else 0)
            raise IrregularPatternError(
                f"segments: id {ids[position]}, of position {position}, is in {most} stretches of positions, more than "
                f"{MAX_COMPONENTS}. Sort the tokens by id.",
                row=row,
                runs=most,
            )
        out: list[Run] = []
        for k in range(most):  # a component of the k-th stretches: with ids that never recur there is one
            here = k < count
            mate = seen[np.where(here, begin + k, 0)]
            start, end = (np.where(here, edge[mate], np.int32(0))[stretch] for edge in (first, stop))
            out += _between(rows, cols, _at(start, rows), _at(end, rows))
        return out

    def __repr__(self) -> str:
        return f"segments({self.ids!r})"


# -- constructors: what users call -------------------------------------------------------------------------------------


def full() -> Pattern:
    """All pairs."""
    return Full()


def causal() -> Pattern:
    """`j <= i` (row i is position `i + query_offset`)."""
    return Causal()


#: What a negative side of a window is often meant to be.
_SIDES = "A side without limit is a large number; leave near keys out by a difference: window(9, 0) - window(2, 0)."


def window(left: int, right: int | None = None) -> Pattern:
    """`i - left <= j <= i + right`, both ends included; `right` is `left` where not given."""
    left = check_int("window", "left", left, 0, remedy=_SIDES)
    return Window(left, left if right is None else check_int("window", "right", right, 0, remedy=_SIDES))


def sliding_window(n: int) -> Pattern:
    """`i - n < j <= i`: n keys with the query's own, as Mistral and Hugging Face count."""
    return SlidingWindow(check_int("sliding_window", "n", n, 1))


def dilated_window(left: int, right: int, dilation: int) -> Pattern:
    """`j = i + dilation*t` for `-left <= t <= right`."""
    left = check_int("dilated_window", "left", left, 0, remedy=_SIDES)
    right = check_int("dilated_window", "right", right, 0, remedy=_SIDES)
    dilation = check_int("dilated_window", "dilation", dilation, 1)
    reach = MAX_LENGTH // dilation
    return DilatedWindow(min(left, reach), min(right, reach), dilation)


def strided(stride: int) -> Pattern:
    """`j = i (mod stride)`."""
    return Strided(check_int("strided", "stride", stride, 1))


def lattice_columns(stride: int, offset: int = 0) -> Pattern:
    """`j = offset (mod stride)`."""
    stride = check_int("lattice_columns", "stride", stride, 1)
    return LatticeColumns(stride, check_int("lattice_columns", "offset", offset, -MAX_LENGTH) % stride)


def blocked(block: int, before: int = 0, after: int = 0) -> Pattern:
    """`i//block - before <= j//block <= i//block + after`."""
    block = check_int("blocked", "block", block, 1)
    reach = MAX_LENGTH // block
    before, after = check_int("blocked", "before", before, 0), check_int("blocked", "after", after, 0)
    return Blocked(block, min(before, reach), min(after, reach))


def sink(n: int) -> Pattern:
    """`j < n`: attention sinks, or global columns."""
    return Sink(check_int("sink", "n", n, 0))


def global_columns(n: int) -> Pattern:
    """`j < n`, the same as `sink(n)`."""
    return Sink(check_int("global_columns", "n", n, 0))


def global_rows(n: int) -> Pattern:
    """`i < n`."""
    return GlobalRows(check_int("global_rows", "n", n, 0))


def global_tokens(n: int) -> Pattern:
    """`i < n` or `j < n`: the first n tokens attend to all and are attended by all."""
    return GlobalTokens(check_int("global_tokens", "n", n, 0))


def segments(ids: Any = None, *, lengths: Any = None) -> Pattern:
    """Pairs in the same segment (packed documents).

    Args:
      ids: int [positions], one id per position; a negative id is padding and attends to nothing. A NumPy array or a
        sequence is static. A JAX array (traced or not) is a run-time value: no re-planning, no recompilation; its ids
        must be contiguous, each id one stretch of positions (padding may be in several): checked here where it is not
        traced, which waits for its device.
      lengths: int [documents] instead of ids: the lengths of the documents, one after the other; what lies past
        their sum is padding.

    Raises:
      PatternError: neither or both given, wrong rank or dtype, negative lengths, ids in several stretches.
    """
    if (ids is None) == (lengths is None):
        given = "neither was" if ids is None else "both were"
        raise PatternError(f"segments: give ids (one per position) or lengths (one per document), but {given} given")
    if lengths is not None:
        _check_int_array("lengths", lengths)
        return SegmentLengths(Frozen(lengths if is_runtime_array(lengths) else _int32_lengths(np.asarray(lengths))))
    _check_int_array("ids", ids)
    if is_runtime_array(ids):
        _check_contiguous(ids)
    else:
        ids = np.asarray(ids)
        if ids.size and not (int(ids.min()) >= -(2**31) and int(ids.max()) < 2**31):  # hashes, say: number them anew
            ids = np.where(ids < 0, -1, np.unique(ids, return_inverse=True)[1])
    return Segments(Frozen(ids))


def _check_int_array(argument: str, values: Any) -> None:
    array = values if is_runtime_array(values) else np.asarray(values)
    if len(array.shape) != 1 or (np.dtype(array.dtype).kind not in "iu" and array.shape[0]):
        raise PatternError(
            f"segments: {argument} must be integers of rank 1, but {array.dtype}{list(array.shape)} was given. "
            "For a batch of different segmentations use jax.vmap over attention."
        )
    if argument == "lengths" and isinstance(array, np.ndarray) and (array < 0).any():
        raise PatternError(f"segments: lengths must not be negative, but {int(array.min())} was given")


def _starts_of_stretches(ids: np.ndarray) -> np.ndarray:
    """Where each stretch of one id begins."""
    return np.flatnonzero(np.append(True, ids[1:] != ids[:-1])[: ids.size])


def _check_contiguous(ids: Array) -> None:
    """Raises PatternError where a run-time array has an id in several stretches; traced ones cannot be looked at."""
    try:
        known = np.asarray(ids)
    except Exception:  # by the kind of array; jax.errors.TracerArrayConversionError, for one
        return
    first = _starts_of_stretches(known)
    first = first[known[first] >= 0]
    found, stretches = np.unique(known[first], return_counts=True)
    again = found[stretches > 1]
    if again.size:
        one, other = first[known[first] == again[0]][:2]
        raise PatternError(
            f"segments: each id of a JAX array must be one stretch of positions, but id {again[0]} begins at {one} and "
            f"again at {other}. Give NumPy ids, which may recur anywhere, or sort the tokens by id."
        )


def _int32_lengths(lengths: Array) -> Array:
    """The lengths, integers of any size, as int32: at most `MAX_LENGTH`, past which there is no position."""
    small = lengths.dtype.itemsize < 4  # the limit has no room in these
    return (lengths if small else array_namespace(lengths).minimum(lengths, MAX_LENGTH)).astype(np.int32)


@dataclasses.dataclass(frozen=True, repr=False)
class SegmentLengths(_Symmetric):
    """Documents one after the other, by their lengths; positions past the last attend to nothing."""

    lengths: Frozen

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        xp = array_namespace(self.lengths.array, rows.start)
        zero = xp.zeros(1, dtype=np.int32)
        ends = xp.cumsum(xp.asarray(_int32_lengths(self.lengths.array)), dtype=np.int32)
        # A length is at most MAX_LENGTH, so that no sum overflows before one has reached it.
        past = xp.cumsum(ends >= MAX_LENGTH, dtype=np.int32) > 0
        edges = xp.concat([zero, xp.where(past, MAX_LENGTH, ends)])
        document = xp.searchsorted(edges, rows.positions, side="right") - 1
        inside = rows.positions < edges[-1]
        first = edges[document]
        stop = edges[xp.minimum(document + 1, edges.shape[0] - 1)]
        return _between(rows, cols, first, xp.where(inside, stop, 0))

    def __repr__(self) -> str:
        return f"segments(lengths={self.lengths!r})"


_CONSTRUCTORS = {
    "Full": "full",
    "Causal": "causal",
    "Window": "window",
    "SlidingWindow": "sliding_window",
    "DilatedWindow": "dilated_window",
    "Strided": "strided",
    "LatticeColumns": "lattice_columns",
    "Blocked": "blocked",
    "Sink": "sink",
    "GlobalRows": "global_rows",
    "GlobalTokens": "global_tokens",
}
