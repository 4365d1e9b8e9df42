"""Affine-compressed sparse rows: the matrix format of the paper (section 4), with several disjoint components.

The paper stores one affine run per row. Here a matrix is a short tuple of components, each with one static stride:

    for component in acsr.components:
        for i in range(q_len):
            for t in range(component.count[i]):
                mask[i, component.start[i] + component.stride * t] = True     # each pair is named once

Metadata is O(rows), whatever the number of non-zeros.

Values, where there are some, are row-compressed: [..., rows, width], each row's components one after the other, each as
wide as its largest count. The pair that component c names as number t of row i has its value at

    values[..., i, acsr.offsets[c] + t]

What lies past a row's count is padding: never read, written as 0.

convert.py makes values and exchanges them with other formats.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from functools import cached_property
from typing import overload

import numpy as np

from splat.acsr import convert
from splat.errors import PatternError
from splat.pattern.core import Array, Run, array_namespace
from splat.pattern.data import transpose_runs

#: Lattice coordinates of rows without a run: past everything, so that every comparison with them is false.
NOWHERE = np.int32(2**30)


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
    """One affine run per row.

    Attributes:
      stride: static; the linear part of the affine index.
      start, count: int32 [rows]; the translation and the number of columns (0: the row has no run here).
      line_step: rows whose indices are equal modulo `line_step` share `start mod stride`; None: no such number.
    """

    stride: int
    start: Array
    count: Array
    line_step: int | None = 1

    def __post_init__(self) -> None:
        for name in ("start", "count"):  # plans and digests of a matrix are kept: nobody may write into it
            array = getattr(self, name)
            if isinstance(array, np.ndarray) and array.flags.writeable:
                array = array.copy()
                array.flags.writeable = False
                object.__setattr__(self, name, array)

    @property
    def is_static(self) -> bool:
        return isinstance(self.start, np.ndarray) and isinstance(self.count, np.ndarray)

    @cached_property
    def width(self) -> int:
        """The largest count. Raises PatternError where it is not known yet."""
        if not self.is_static:
            raise PatternError(
                "the width of this ACSR's values is not known yet: its counts are run-time arrays. Build it from a "
                "pattern of NumPy arrays and Python numbers."
            )
        return int(self.count.max(initial=0))

    @cached_property
    def has_empty_rows(self) -> bool:
        """Whether some row has no run here (assumed where that is not known yet)."""
        if not self.is_static:
            return True
        count = self.count[:1] if self.count.strides == (0,) else self.count  # one number for all rows
        return bool((count <= 0).any())

    @cached_property
    def bounds(self) -> tuple[Array, Array]:
        """(lower, upper), int32 [rows]: the row's columns in lattice coordinates, x = column // stride.


        They are [lower, upper); rows without a run get lower = NOWHERE and upper = -NOWHERE.
        """
        lower = self.start if self.stride == 1 else self.start // np.int32(self.stride)
        upper = lower + self.count
        if self.has_empty_rows:
            xp = array_namespace(self.start, self.count)
            here = self.count > 0
            lower, upper = xp.where(here, lower, NOWHERE), xp.where(here, upper, -NOWHERE)
        return lower, upper

    @property
    def hull(self) -> Component:
        """All columns from each row's first to its last, stride 1. Static numbers only."""
        if self.stride == 1:
            return self
        reach = (self.count - 1) * np.int32(self.stride) + 1
        return Component(1, self.start, np.where(self.count > 0, reach, 0).astype(np.int32))

    @cached_property
    def residue(self) -> Array:
        """`start mod stride`, int32 [rows]; 0 in rows without a run."""
        residue = self.start - self.start // np.int32(self.stride) * np.int32(self.stride)
        if self.has_empty_rows:
            residue = array_namespace(self.start, self.count).where(self.count > 0, residue, 0)
        return residue


@dataclasses.dataclass(frozen=True, eq=False)
class ACSR:
    """The non-zeros of a q_len x kv_len matrix as disjoint affine components. Values are arrays of their own."""

    shape: tuple[int, int]
    components: tuple[Component, ...]

    @property
    def is_static(self) -> bool:
        return all(c.is_static for c in self.components)

    @cached_property
    def row_nnz(self) -> np.ndarray:
        """Non-zeros of each row, int32 [rows]."""
        total = np.zeros(self.shape[0], np.int32)
        for component in self.components:
            total += component.count
        return total

    @cached_property
    def seen_columns(self) -> tuple[int, int, int]:
        """(first, stop, count) of the columns that some row has; fewer than `stop - first` where some between lack."""
        runs = []
        for c in self.components:
            here, stride = c.count > 0, c.stride if c.width > 1 else 1
            if here.any():
                runs.append((c.start[here], (c.start + c.count * stride)[here], stride))
        if not runs:
            return 0, 0, 0
        if all(stride == 1 for *_, stride in runs):  # intervals: the length does not matter
            start, stop = (np.concatenate(bounds) for bounds in list(zip(*runs, strict=True))[:2])
            order = np.argsort(start, kind="stable")
            start, reach = start[order], np.maximum.accumulate(stop[order])
            gaps = np.maximum(start[1:] - reach[:-1], 0).sum(dtype=np.int64)
            return int(start[0]), int(reach[-1]), int(reach[-1] - start[0] - gaps)
        seen = np.zeros(self.shape[1], bool)
        for start, stop, stride in runs:
            size = -(-self.shape[1] // stride) * stride + stride
            change = np.bincount(start, minlength=size)[:size] - np.bincount(stop, minlength=size)[:size]
            seen |= (change.reshape(-1, stride).cumsum(axis=0) > 0).reshape(-1)[: self.shape[1]]
        at = np.flatnonzero(seen)
        return int(at[0]), int(at[-1]) + 1, at.size

    @cached_property
    def nnz(self) -> int:
        return int(self.row_nnz.sum(dtype=np.int64))

    @property
    def density(self) -> float:
        return self.nnz / max(self.shape[0] * self.shape[1], 1)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each component's values begin in a row."""
        return tuple(itertools.accumulate((c.width for c in self.components[:-1]), initial=0))[: len(self.components)]

    @cached_property
    def width(self) -> int:
        """Values of a row, padding counted: the sum of the components' largest counts."""
        return sum(c.width for c in self.components)

    def has_value(self) -> np.ndarray:
        """Which entries of values are not padding, bool [rows, width]."""
        parts = [np.arange(c.width, dtype=np.int32) < np.asarray(c.count)[:, None] for c in self.components]
        return np.concatenate(parts, axis=1) if parts else np.zeros((self.shape[0], 0), bool)

    def columns(self) -> np.ndarray:
        """The column of each value, int32 [rows, width]; -1 in padding. For tests and conversion: O(non-zeros)."""
        parts = []
        for c in self.components:
            t = np.arange(c.width, dtype=np.int32)
            parts.append(np.where(t < c.count[:, None], c.start[:, None] + np.int32(c.stride) * t, np.int32(-1)))
        return np.concatenate(parts, axis=1) if parts else np.zeros((self.shape[0], 0), np.int32)

    @property
    def metadata_bytes(self) -> int:
        """Bytes of all start and count arrays."""
        return sum(2 * 4 * self.shape[0] for _ in self.components)

    @overload
    def to_dense(self) -> np.ndarray: ...
    @overload
    def to_dense(self, values: Array) -> Array: ...
    def to_dense(self, values: Array | None = None) -> Array:
        """The mask, bool [q_len, kv_len]; or, with values [..., rows, width], the matrices [..., rows, cols].

        Matrices have the dtype of the values, and are NumPy or JAX as they are. Traceable, differentiable.

        Raises:
          PatternError: a pair is named twice or lies outside.
          ArgumentError: `values` has another shape.
        """
        if values is not None:
            return convert.dense_of(self, values)
        count = np.zeros(self.shape, np.int32)
        row = np.arange(self.shape[0])
        for component in self.components:
            start, number = np.asarray(component.start), np.asarray(component.count)
            for t in range(int(number.max(initial=0))):
                here = t < number
                np.add.at(count, (row[here], start[here] + component.stride * t), 1)
        if (count > 1).any():
            raise PatternError("this ACSR names a pair more than once: its components are not disjoint")
        return count.astype(bool)

    def validate(self) -> None:
        """Raises PatternError unless shapes, dtypes, bounds and line steps are right (disjointness: `to_dense`)."""
        rows, cols = self.shape
        for n, c in enumerate(self.components):
            where = f"component {n} of this ACSR"
            if c.stride < 1 or c.start.shape != (rows,) or c.count.shape != (rows,):
                raise PatternError(f"{where} needs stride >= 1 and start, count of shape [{rows}], but has {c}")
            if c.start.dtype != np.int32 or c.count.dtype != np.int32:
                raise PatternError(f"{where} needs int32 arrays, but has {c.start.dtype} and {c.count.dtype}")
            if not c.is_static:
                continue
            start = c.start[c.count > 0]
            last = start + (c.count[c.count > 0].astype(np.int64) - 1) * c.stride
            if (c.count < 0).any() or (start < 0).any() or (last >= cols).any():
                raise PatternError(f"{where} leaves the matrix of {rows} x {cols}")
            if c.line_step is not None and c.stride > 1:
                row = np.flatnonzero(c.count > 0)
                group, residue = row % c.line_step, start % c.stride
                order = np.argsort(group, kind="stable")
                same = group[order][1:] == group[order][:-1]
                if (residue[order][1:] != residue[order][:-1])[same].any():
                    raise PatternError(
                        f"{where}: rows equal modulo {c.line_step} do not share a residue. Give line_step=None where "
                        "residues follow no such rule."
                    )

    def validate_once(self) -> None:
        """`validate`, of which the good answer is kept: numbers do not change."""
        if "_is_valid" not in self.__dict__:
            self.validate()
            self.__dict__["_is_valid"] = True

    def transpose(self) -> ACSR:
        """The transposed matrix, by its numbers. Raises IrregularPatternError where its columns are not regular."""
        return self._transposed

    @cached_property
    def _transposed(self) -> ACSR:
        runs = transpose_runs([Run(c.stride, c.start, c.count, c.line_step) for c in self.components], self.shape[1])
        components = tuple(Component(r.stride, r.start, r.count, r.line_step) for r in runs)
        return ACSR((self.shape[1], self.shape[0]), components)

    # Values and exchange with other formats: the functions of convert.py, as methods.
    pairs = cached_property(convert.make_pairs)
    transposition = cached_property(convert.make_transposition)
    values_of = convert.values_of
    transpose_values = convert.transpose_values
    from_dense = staticmethod(convert.from_dense)
    from_scipy = staticmethod(convert.from_scipy)
    from_bcoo = staticmethod(convert.from_bcoo)
    from_bcsr = staticmethod(convert.from_bcsr)
    to_scipy = convert.to_scipy
    to_bcoo = convert.to_bcoo
    to_bcsr = convert.to_bcsr

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ACSR) or self.shape != other.shape or len(self.components) != len(other.components):
            return False
        return all(
            a.stride == b.stride and np.array_equal(a.count, b.count) and np.array_equal(_used(a), _used(b))
            for a, b in zip(self.components, other.components, strict=True)
        )

    @cached_property
    def digest(self) -> str:
        """A hash of all numbers; of equal ones for equal matrices of one form."""
        state = hashlib.sha256(repr((self.shape, [c.stride for c in self.components])).encode())
        for c in self.components:
            state.update(np.ascontiguousarray(c.count).tobytes())
            state.update(np.ascontiguousarray(_used(c)).tobytes())
        return state.hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        rows, cols = self.shape
        lines = [f"ACSR {rows} x {cols}, {len(self.components)} components"]
        if self.is_static:
            lines[0] += f", {self.nnz} non-zeros ({self.density:.2%}), {self.metadata_bytes} bytes of metadata"
        for n, c in enumerate(self.components):
            here = f", up to {int(c.count.max(initial=0))} a row" if c.is_static else ", run-time"
            lines.append(f"  {n}: stride {c.stride}{here}")
        return "\n".join(lines)


def _used(component: Component) -> np.ndarray:
    return np.where(component.count > 0, component.start, 0)
