"""Operations on values through Triton's interpreter on NumPy arrays, and what they should be, in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import splat
from splat.acsr import ACSR
from splat.codegen.base import How
from splat.codegen.triton import interpret
from splat.codegen.triton.launch import Launch
from splat.codegen.triton.values import Operations
from splat.planning.kernels import INTERPRETER

Array = np.ndarray[Any, Any]

#: Largest error relative to the largest value of the truth, by dtype of the dense arrays.
TOLERANCE = {"float32": 5e-6, "bfloat16": 1.5e-2, "float16": 2e-3}


def carry_out(launch: Launch) -> list[Array]:
    """Fails where the kernel leaves an element of an output unwritten, or reads what would make it NaN."""
    results = interpret.launch(launch)
    for result in results:
        missing = np.isnan(result.astype(np.float32))
        assert not missing.any(), f"{launch.kernel.name}: {missing.sum()} elements are NaN or not written"
    return results


OPERATIONS = Operations(INTERPRETER, carry_out, np.asarray)


def by(how: How) -> Any:
    """The operations as `how` has them, on row-compressed values whatever the layout."""
    operations = dataclasses.replace(OPERATIONS, how=how)
    return operations if how.layout == "rows" else Packed(operations)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Layout "tiles", which is packed, behind row-compressed values."""

    operations: Operations

    def sddmm(self, acsr: ACSR, rows: Array, columns: Array) -> Array:
        return self._rows(acsr, self.operations.sddmm(acsr, rows, columns))

    def softmax(self, acsr: ACSR, values: Array) -> Array:
        return self._rows(acsr, self.operations.softmax(acsr, values[:, acsr.has_value()]))

    def spmm(self, acsr: ACSR, values: Array, dense: Array) -> Array:
        return self.operations.spmm(acsr, values[:, acsr.has_value()], dense)

    def spmm_transposed(self, acsr: ACSR, values: Array, dense: Array) -> Array:
        return self.operations.spmm_transposed(acsr, values[:, acsr.has_value()], dense)

    @staticmethod
    def _rows(acsr: ACSR, packed: Any) -> Array:
        assert packed.shape[1:] == (acsr.nnz,)
        out = np.zeros((len(packed), acsr.shape[0], acsr.width), np.float32)
        out[:, acsr.has_value()] = packed
        return out


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A sparse matrix to compute with, and the same as a dense mask."""

    acsr: ACSR
    mask: Array

    def values_of(self, dense: Array, padding: float = 0.0) -> Array:
        """[B, T, S] -> values [B, T, width]."""
        columns = self.acsr.columns()
        taken = np.take_along_axis(dense, np.maximum(columns, 0)[None], axis=2)
        return np.where(columns[None] >= 0, taken, padding)

    def dense_of(self, values: Array) -> Array:
        """Values [B, T, width] -> [B, T, S] with zeros."""
        columns, out = self.acsr.columns(), np.zeros((len(values), *self.acsr.shape))
        row, t = np.nonzero(columns >= 0)
        out[:, row, columns[row, t]] = values[:, row, t]
        return out


def matrix(text: str, q_len: int, kv_len: int | None = None) -> Matrix:
    acsr = splat.build(splat.parse(text), q_len, q_len if kv_len is None else kv_len)
    return Matrix(acsr, acsr.to_dense())


def draw(rng: np.random.Generator, m: Matrix, *, batch: int = 2, head_dim: int = 8, dtype: Any = "float32") -> Any:
    """Row array [B, T, H], column array [B, S, H], values [B, T, width] with NaN in padding.

    NaN is also in every row and every column that is in no pair.
    """
    rows = rng.standard_normal((batch, m.acsr.shape[0], head_dim))
    columns = rng.standard_normal((batch, m.acsr.shape[1], head_dim))
    values = m.values_of(rng.standard_normal((batch, *m.acsr.shape)), np.nan)
    rows[:, ~m.mask.any(axis=1)] = np.nan
    columns[:, ~m.mask.any(axis=0)] = np.nan
    return rows.astype(dtype), columns.astype(dtype), values.astype(np.float32)


def truth(m: Matrix, rows: Array, columns: Array, values: Array) -> dict[str, Array]:
    """Every operation's result in float64; zeros where there is nothing."""
    rows, columns = (np.nan_to_num(x.astype(np.float64)) for x in (rows, columns))
    dense = m.dense_of(values.astype(np.float64))
    scores = np.where(m.mask, dense, -np.inf)
    top = np.max(scores, axis=2, keepdims=True, initial=-1e30)
    weights = np.exp(scores - top)
    weights = weights / np.maximum(weights.sum(axis=2, keepdims=True), 1e-300)
    return {
        "sddmm": m.values_of(rows @ columns.swapaxes(1, 2)),
        "softmax": m.values_of(weights),
        "spmm": dense @ columns,
        "spmm_transposed": dense.swapaxes(1, 2) @ rows,
    }


def check(m: Matrix, rows: Any, columns: Any, values: Any, operations: Any = OPERATIONS) -> None:
    """All four operations against the truth; `operations` has them as methods."""
    expected = truth(m, *map(np.asarray, (rows, columns, values)))
    found = {
        "sddmm": operations.sddmm(m.acsr, rows, columns),
        "softmax": operations.softmax(m.acsr, values),
        "spmm": operations.spmm(m.acsr, values, columns),
        "spmm_transposed": operations.spmm_transposed(m.acsr, values, rows),
    }
    has_value = m.acsr.has_value()
    for name, wanted in expected.items():
        result = np.asarray(found[name])
        of_values = name in ("sddmm", "softmax")
        assert str(result.dtype) == ("float32" if of_values else str(rows.dtype)), name
        assert result.shape == wanted.shape, name
        if of_values:
            assert not result[:, ~has_value].any(), f"{name}: padding is not 0"
        limit = TOLERANCE[str(rows.dtype)] if name != "softmax" else TOLERANCE["float32"]
        error = np.abs(result.astype(np.float64) - wanted).max(initial=0) / max(1, np.abs(wanted).max(initial=0))
        assert error <= limit, f"{name}: error {error:.2g}"
