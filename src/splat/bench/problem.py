"""One thing to be computed: an operation on a pattern at a size, its input and its structure."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import NamedTuple

import ml_dtypes
import numpy as np

import splat
from splat.acsr import ACSR
from splat.acsr.convert import Pairs, make_pairs
from splat.bench.cases import Case
from splat.pattern import Pattern


@dataclasses.dataclass(frozen=True)
class Operation:
    """What is measured.

    Attributes:
      name: as the command line spells it.
      flops_per_nonzero: for one non-zero and one element of the head dimension; 0: not stated.
      heads: of the input, where the command line says nothing, on a CPU.
      dtypes: of the input, that it is measured with.
    """

    name: str
    flops_per_nonzero: int
    heads: int
    dtypes: tuple[str, ...] = ("float32",)


#: Operation, case, positions, heads, head dim and dtype.
Key = tuple[str, str, int, int, int, str]

OPERATIONS = {
    one.name: one
    for one in (
        Operation("sddmm", 2, 1),
        Operation("softmax", 0, 1),
        Operation("spmm", 2, 1),
        Operation("composed", 4, 1),  # sddmm, softmax and spmm, one after the other
        Operation("attention", 4, 8, ("float32", "bfloat16")),
        # Two matrix products forward; backward five: the scores again, and the gradients of weights, V, Q and K.
        Operation("training", 14, 8, ("float32", "bfloat16")),
        Operation("planning", 0, 1),
    )
}


class Inputs(NamedTuple):
    """Float32 arrays of numbers that the problem's dtype has: everyone converts them to it without a difference.

    Attributes:
      query, key, value: [heads, positions, head dim].
      d_out: of training, the cotangent of the output, [heads, positions, head dim]; else empty.
      values: of spmm and softmax, [heads, positions, width], padding 0; else empty.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    d_out: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Problem:
    """An operation on a case at a size, batch 1; `dtype` is that of input and result."""

    op: str
    case: Case
    q_len: int
    heads: int
    head_dim: int
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def key(self) -> Key:
        """What two runs are compared by; see `Record.key`."""
        return self.op, self.case.name, self.q_len, self.heads, self.head_dim, self.dtype

    @cached_property
    def pattern(self) -> Pattern:
        (pattern,) = self.case.patterns(self.q_len)
        return pattern

    @cached_property
    def text(self) -> str:
        return self.case.expression(self.q_len)

    @cached_property
    def acsr(self) -> ACSR:
        return splat.build(self.pattern, self.q_len, self.q_len)

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype, with what `ml_dtypes` adds to NumPy."""
        return np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))

    @property
    def nnz(self) -> int:
        return self.acsr.nnz

    @property
    def flops(self) -> int:
        """Over non-zeros only."""
        return OPERATIONS[self.op].flops_per_nonzero * self.nnz * self.head_dim * self.heads

    @property
    def csr_bytes(self) -> int:
        """Of CSR's indptr and indices, int32."""
        return 4 * (self.q_len + 1 + self.nnz)

    @cached_property
    def inputs(self) -> Inputs:
        """The same in every process."""
        rng = np.random.default_rng(0)
        dense = (self.heads, self.q_len, self.head_dim)
        query, key, value, d_out = (
            rng.standard_normal(shape, np.float32).astype(self.numpy_dtype).astype(np.float32)
            for shape in (dense, dense, dense, dense if self.op == "training" else (0, 0, 0))
        )
        if self.op not in ("spmm", "softmax"):
            return Inputs(query, key, value, d_out, np.zeros((self.heads, 0, 0), np.float32))
        values = rng.standard_normal((self.heads, self.q_len, self.acsr.width), np.float32)
        return Inputs(query, key, value, d_out, np.where(self.acsr.has_value(), values, np.float32(0)))

    @cached_property
    def pairs(self) -> Pairs:
        """The non-zeros in the order of CSR, O(non-zeros): for peers. Not the ACSR's own, which outlive the problem."""
        return make_pairs(self.acsr)

    @cached_property
    def data(self) -> np.ndarray:
        """`inputs.values` as CSR has them, float32 [heads, non-zeros]; ones where there are none."""
        values = self.inputs.values
        if not values.size:
            return np.ones((self.heads, self.nnz), np.float32)
        return np.ascontiguousarray(values[:, self.pairs.row, self.pairs.slot])

    def release(self) -> None:
        """Drops what is large. It is made again where it is needed."""
        for name in ("inputs", "pairs", "data"):
            self.__dict__.pop(name, None)

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(columns, ascending; where the row's values have theirs), of one row."""
        columns, places = [], []
        for component, offset in zip(self.acsr.components, self.acsr.offsets, strict=True):
            t = np.arange(int(component.count[row]))
            columns.append(int(component.start[row]) + component.stride * t)
            places.append(offset + t)
        if not columns:
            return np.zeros(0, int), np.zeros(0, int)
        order = np.argsort(np.concatenate(columns))
        return np.concatenate(columns)[order], np.concatenate(places)[order]

    def queries(self, key: int) -> np.ndarray:
        """The rows that attend to a column, ascending."""
        attend = np.zeros(self.q_len, bool)
        for component in self.acsr.components:
            step, rest = np.divmod(key - np.asarray(component.start), component.stride)
            attend |= (rest == 0) & (step >= 0) & (step < np.asarray(component.count))
        return np.flatnonzero(attend)

    def __str__(self) -> str:
        return f"{task(self.op, self.dtype)}, {self.case.name}, {self.q_len:,} positions"


def task(op: str, dtype: str) -> str:
    """What one table is of: an operation, and the dtype where it is not the usual one."""
    return op if dtype == "float32" else f"{op}, {dtype}"
