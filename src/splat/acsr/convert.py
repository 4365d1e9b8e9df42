"""Exchange: ACSR and its values from and to dense arrays, SciPy and `jax.experimental.sparse`; values of the transpose.

The functions here are methods of `ACSR`. All go through one index map, the non-zeros in the order of CSR with the place
of each in values:

    values [rows, width]      row     0 0 1 2 2
      a b                     column  0 2 1 0 3          number n is dense[row[n], column[n]]
      c .                     slot    0 1 0 0 1                  and values[row[n], slot[n]]
      d e                     place   0 1 / 2 . / 3 4    values[i, s] is number place[i, s]

Padding is in none of these maps, so what lies there, NaN included, reaches no result and no derivative. The maps are
O(non-zeros), made in NumPy when first needed and kept as long as their ACSR. NumPy in is NumPy out and JAX in is JAX
out. Values may be traced; the structure is always known. A dtype is kept, or refused.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from splat.errors import ArgumentError, PatternError, UnsupportedError
from splat.pattern.core import Array, Pattern, is_runtime_array
from splat.pattern.data import from_csr, from_mask

if TYPE_CHECKING:
    from splat.acsr.format import ACSR

_FORMATS = ("csr", "csc", "coo")
_MOST_VALUES = 2**30  # of a matrix, padding counted: the maps are int32


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """The non-zeros of an ACSR one by one, ordered by row and column; read-only, O(non-zeros).

    Attributes:
      row, column, slot: int32 [nnz]; number n has its value at `values[..., row[n], slot[n]]`.
      indptr: int32 [rows + 1]; row i owns the numbers from `indptr[i]` to `indptr[i + 1]`.
      place: int32 [rows, width]; the number of each value; in padding numbers from nnz on, each once.
    """

    row: np.ndarray
    column: np.ndarray
    slot: np.ndarray
    indptr: np.ndarray
    place: np.ndarray

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            getattr(self, field.name).flags.writeable = False


def make_pairs(acsr: ACSR) -> Pairs:
    """The non-zeros one by one, in the order of CSR: `acsr.pairs`, made when first needed.

    Raises:
      PatternError: a pair is named twice, or the numbers are run-time arrays.
      UnsupportedError: more than 2**30 values.
    """
    rows, cols = acsr.shape
    if rows * acsr.width > _MOST_VALUES:
        raise UnsupportedError(
            f"values are exchanged one by one up to 2**30 of them, but this ACSR has {rows} rows x {acsr.width}. "
            "Convert fewer rows at a time."
        )
    here = acsr.has_value()
    row, slot = np.nonzero(here)
    column = acsr.columns()[here]
    key = row * cols + column
    if (key[1:] <= key[:-1]).any():
        order = np.argsort(key, kind="stable")
        row, column, slot, key = row[order], column[order], slot[order], key[order]
        if (key[1:] == key[:-1]).any():
            raise PatternError("this ACSR names a pair more than once: its components are not disjoint")
    place = np.empty(here.shape, np.int32)
    place[row, slot] = np.arange(row.size)
    place[~here] = np.arange(row.size, here.size)
    indptr = np.searchsorted(row, np.arange(rows + 1)).astype(np.int32)
    return Pairs(row.astype(np.int32), column, slot.astype(np.int32), indptr, place)


def make_transposition(acsr: ACSR) -> tuple[np.ndarray, np.ndarray]:
    """Where the values of `acsr.transpose()` lie in those of `acsr`: (row, slot), int32 [cols, width of the transpose].

    `acsr.transposition`, made when first needed. In padding the slot lies past the width; no place is named twice.
    """
    pairs, across = acsr.pairs, acsr.transpose().pairs
    order = np.argsort(pairs.column, kind="stable")  # by column, then row: the transpose's order
    row = np.zeros(across.place.shape, np.int32)
    slot = np.int32(acsr.width) + across.place
    row[across.row, across.slot] = pairs.row[order]
    slot[across.row, across.slot] = pairs.slot[order]
    return row, slot


# -- values ------------------------------------------------------------------------------------------------------------


def dense_of(acsr: ACSR, values: Array) -> Array:
    """`acsr.to_dense(values)`: [..., rows, width] -> [..., rows, cols]."""
    data, pairs = _data(acsr, values), acsr.pairs
    shape = (*data.shape[:-1], *acsr.shape)
    if isinstance(data, np.ndarray):
        dense = np.zeros(shape, data.dtype)
        dense[..., pairs.row, pairs.column] = data
        return dense
    dense = data.__array_namespace__().zeros(shape, data.dtype)
    return dense.at[..., pairs.row, pairs.column].set(data, unique_indices=True, indices_are_sorted=True)


def values_of(acsr: ACSR, dense: Array) -> Array:
    """The values [..., rows, width] of dense matrices [..., rows, cols], 0 in padding. Traceable, differentiable.

    Raises ArgumentError where `dense` has another shape.
    """
    dense, (rows, cols) = _array("dense", dense, "[..., rows, cols]", acsr.shape), acsr.shape
    columns = acsr.columns()
    columns = np.where(columns < 0, cols + np.arange(acsr.width, dtype=np.int32), columns)
    return _gather(dense, np.arange(rows, dtype=np.int32)[:, None], columns)


def transpose_values(acsr: ACSR, values: Array) -> Array:
    """The values of `acsr.transpose()`, 0 in padding, from values [..., rows, width]. Traceable, differentiable.

    Raises:
      ArgumentError: `values` has another shape.
      IrregularPatternError: the matrix is not regular by columns.
    """
    values = _array("values", values, "[..., rows, width]", (acsr.shape[0], acsr.width))
    return _gather(values, *acsr.transposition)


def _data(acsr: ACSR, values: Array) -> Array:
    """values [..., rows, width] -> [..., nnz] in the order of CSR."""
    values = _array("values", values, "[..., rows, width]", (acsr.shape[0], acsr.width))
    return _gather(values, acsr.pairs.row, acsr.pairs.slot)


def _gather(array: Array, *index: np.ndarray) -> Array:
    """`array[..., *index]`, and 0 where the last index is past the end. No element may be named twice."""
    if not isinstance(array, np.ndarray):
        return array.at[(..., *index)].get(mode="fill", fill_value=0, unique_indices=True)
    inside = index[-1] < array.shape[-1]
    out = np.zeros((*array.shape[: -len(index)], *inside.shape), array.dtype)
    out[..., inside] = array[(..., *(np.broadcast_to(each, inside.shape)[inside] for each in index))]
    return out


# -- dense arrays and SciPy --------------------------------------------------------------------------------------------


def from_dense(matrix: Array, *, max_components: int = 64) -> tuple[ACSR, Array]:
    """(acsr, values) of a NumPy or JAX matrix [rows, cols]: its non-zero entries, of which NaN is one.

    The dtype is kept: the values of a bool mask are True. Inside jit or grad, where the entries are not known, make the
    ACSR outside and use `acsr.values_of(matrix)`.

    Raises:
      ArgumentError: not an array [rows, cols], or a traced one.
      IrregularPatternError: a row needs more than `max_components` arithmetic progressions; it says which.
    """
    matrix = _array("matrix", matrix, "[rows, cols]")
    mask = _known("matrix", matrix) != 0
    acsr = _build(from_mask(mask, max_components=max_components), mask.shape)
    return acsr, values_of(acsr, matrix)


def from_scipy(matrix: Any, *, max_components: int = 64) -> tuple[ACSR, np.ndarray]:
    """(acsr, values) of a sparse array or matrix of SciPy: its stored entries, zeros included; duplicates are summed.

    Raises:
      ArgumentError: not sparse, or not 2-D.
      IrregularPatternError: a row needs more than `max_components` arithmetic progressions; it says which.
    """
    if not hasattr(matrix, "tocoo") or matrix.ndim != 2:
        raise ArgumentError(
            f"matrix must be a 2-D sparse array or matrix of SciPy, but {_name(matrix)} was given. ACSR.from_dense "
            "takes dense arrays, from_bcoo and from_bcsr those of jax.experimental.sparse."
        )
    coo = matrix.tocoo(copy=False)
    return _from_triplets(coo.row, coo.col, coo.data, coo.shape, max_components)


def to_scipy(acsr: ACSR, values: Array, format: str = "csr") -> Any:
    """A sparse array of SciPy ("csr", "csc" or "coo") of values [rows, width]: canonical, zeros stored.

    Raises:
      ArgumentError: no such format; `values` has another shape, or is traced.
      UnsupportedError: a dtype that SciPy has not, such as bfloat16.
    """
    if format not in _FORMATS:
        raise ArgumentError(f"format must be one of {', '.join(_FORMATS)}, but {format!r} was given")
    data, pairs = _known("values", _data(acsr, values)), acsr.pairs
    if data.ndim != 1:
        raise ArgumentError(
            f"values must have shape [rows, width] = {[acsr.shape[0], acsr.width]}, because SciPy's arrays are one "
            f"matrix each, but {list(values.shape)} was given. Convert one at a time, or use to_bcoo or to_bcsr."
        )
    if data.dtype.kind not in "biufc" or data.dtype.isbuiltin != 1 or data.dtype == np.float16:
        raise UnsupportedError(
            f"values must have a dtype that SciPy's sparse arrays have, but {data.dtype} was given. Convert them "
            'first, with values.astype("float32").'
        )
    import scipy.sparse

    # Copies: SciPy's arrays are changed in place, the map is not.
    csr = scipy.sparse.csr_array((data, pairs.column.copy(), pairs.indptr.copy()), shape=acsr.shape)
    return csr.asformat(format)


# -- jax.experimental.sparse -------------------------------------------------------------------------------------------


def from_bcoo(matrix: Any, *, max_components: int = 64) -> tuple[ACSR, Array]:
    """(acsr, values) of a BCOO of `jax.experimental.sparse`: its stored entries, zeros included; duplicates are summed.

    Batch axes are the leading axes of values; all matrices of a batch must have one structure. `data` may be traced and
    is differentiable; `indices` must be known.

    Raises:
      ArgumentError: not a BCOO, other axes than batch, row and column, a batch of different structures, traced indices.
      IrregularPatternError: a row needs more than `max_components` arithmetic progressions; it says which.
    """
    _check_jax_sparse("BCOO", matrix)
    row, column = _shared(matrix, "indices").T
    return _from_triplets(row, column, _batched(matrix), matrix.shape[-2:], max_components)


def from_bcsr(matrix: Any, *, max_components: int = 64) -> tuple[ACSR, Array]:
    """(acsr, values) of a BCSR of `jax.experimental.sparse`, as `from_bcoo`."""
    _check_jax_sparse("BCSR", matrix)
    column, indptr = _shared(matrix, "indices"), _shared(matrix, "indptr")
    length = np.diff(indptr)
    if indptr[0] != 0 or (length < 0).any() or indptr[-1] > column.size:
        raise ArgumentError(
            f"matrix must have an indptr that goes up from 0 to at most {column.size}, the stored entries, but "
            f"{indptr.tolist() if indptr.size < 9 else 'another one'} was given"
        )
    row = np.repeat(np.arange(length.size), length)  # what is stored past indptr[-1] is padding
    return _from_triplets(row, column[: row.size], _batched(matrix)[..., : row.size], matrix.shape[-2:], max_components)


def to_bcoo(acsr: ACSR, values: Array) -> Any:
    """A BCOO of `jax.experimental.sparse` of values [..., rows, width]: sorted, no duplicates, zeros stored.

    Leading axes are batch axes, all with the same indices, stored once. Traceable, differentiable.

    Raises:
      ArgumentError: `values` has another shape.
      UnsupportedError: a dtype that JAX has not, such as float64 where jax_enable_x64 is not set.
    """
    from jax.experimental.sparse import BCOO

    data, pairs = _data(acsr, values), acsr.pairs
    return _jax_sparse(BCOO, data, [np.stack([pairs.row, pairs.column], axis=-1)], acsr.shape)


def to_bcsr(acsr: ACSR, values: Array) -> Any:
    """A BCSR of `jax.experimental.sparse` of values [..., rows, width], as `to_bcoo`."""
    from jax.experimental.sparse import BCSR

    data, pairs = _data(acsr, values), acsr.pairs
    return _jax_sparse(BCSR, data, [pairs.column, pairs.indptr], acsr.shape)


def _jax_sparse(kind: Any, data: Array, index: list[np.ndarray], shape: tuple[int, int]) -> Any:
    lead = data.shape[:-1]
    index = [np.expand_dims(each, tuple(range(len(lead)))) for each in index]
    matrix = kind((data, *index), shape=(*lead, *shape), indices_sorted=True, unique_indices=True)
    if matrix.dtype != data.dtype:
        raise UnsupportedError(
            f"values must have a dtype that JAX has, but {data.dtype} was given, of which it makes {matrix.dtype}. Set "
            f'jax_enable_x64, or convert them first, with values.astype("{matrix.dtype}").'
        )
    return matrix


def _check_jax_sparse(kind: str, matrix: Any) -> None:
    if type(matrix).__name__ != kind:
        raise ArgumentError(
            f"matrix must be a {kind} of jax.experimental.sparse, but {_name(matrix)} was given. ACSR.from_dense takes "
            f"dense arrays, from_scipy SciPy's, {'from_bcsr a BCSR' if kind == 'BCOO' else 'from_bcoo a BCOO'}."
        )
    if matrix.n_sparse != 2 or matrix.n_dense:
        raise ArgumentError(
            "matrix must have its rows and columns sparse and all axes before them as batch axes, but n_batch = "
            f"{matrix.n_batch}, n_sparse = {matrix.n_sparse}, n_dense = {matrix.n_dense} was given. Make it with "
            f"n_batch = {len(matrix.shape) - 2}."
        )


def _shared(matrix: Any, name: str) -> np.ndarray:
    """The indices or the indptr that all matrices of a batch have in common."""
    known = _known(f"matrix.{name}", getattr(matrix, name))
    lead = known.shape[: matrix.n_batch]
    each = known.reshape(math.prod(lead), *known.shape[matrix.n_batch :])
    if not each.shape[0] or (each != each[0]).any():
        raise ArgumentError(
            f"matrix must be a batch of matrices with the same {name}, but {'none' if 0 in lead else 'different ones'} "
            "were given. Convert them one at a time, or give them all the union of their non-zeros."
        )
    return each[0]


def _batched(matrix: Any) -> Array:
    """The data of a BCOO or BCSR, [*batch, nse], also where one serves a whole axis."""
    data = matrix.data
    return data.__array_namespace__().broadcast_to(data, (*matrix.shape[:-2], data.shape[-1]))


# -- what they share ---------------------------------------------------------------------------------------------------


def _build(pattern: Pattern, shape: tuple[int, ...]) -> ACSR:
    from splat.acsr.build import build  # late: it makes the class that has these functions as methods

    return build(pattern, *shape)


def _from_triplets(
    row: np.ndarray, column: np.ndarray, data: Array, shape: tuple[int, ...], max_components: int
) -> tuple[ACSR, Array]:
    """ACSR and values of the entries (row, column), [n] in any order, with data [..., n]; of equal ones the sum.

    Entries past the shape are left out: JAX pads with them.
    """
    rows, cols = shape
    if row.size and min(row.min(), column.min()) < 0:
        raise ArgumentError("matrix must have no negative index, but has some. Count from the first row and column.")
    inside = (row < rows) & (column < cols)
    if not inside.all():
        row, column, data = row[inside], column[inside], data[..., inside]
    pair, number = np.unique(row.astype(np.int64) * cols + column, return_inverse=True)
    indptr = np.searchsorted(pair, np.arange(rows + 1) * cols)
    acsr = _build(from_csr(indptr, pair % max(cols, 1), (rows, cols), max_components=max_components), shape)
    return acsr, _gather(_collect(data, number, pair.size), acsr.pairs.place)


def _collect(data: Array, number: np.ndarray, size: int) -> Array:
    """data [..., n] at its numbers, [..., size]; what has the same number is summed (of booleans: whether any is)."""
    shape, distinct = (*data.shape[:-1], size), size == number.size
    if isinstance(data, np.ndarray):
        out = np.zeros(shape, data.dtype)
        if distinct:
            out[..., number] = data
        else:
            np.add.at(out.T, number, data.T)
        return out
    at = data.__array_namespace__().zeros(shape, data.dtype).at[..., number]
    if distinct:
        return at.set(data, unique_indices=True)
    return at.max(data) if data.dtype == bool else at.add(data)


def _array(name: str, array: Array, letters: str, tail: tuple[int, int] | None = None) -> Array:
    """The array, after checking that it ends in `tail`; where None, that it has two axes."""
    if isinstance(array, np.ma.MaskedArray):
        raise ArgumentError(f"{name} must not be a masked array. Its filled(0) has zeros, which are not stored.")
    if not isinstance(array, np.ndarray) and not is_runtime_array(array):
        remedy = "np.asarray makes one" if tail else "from_scipy, from_bcoo and from_bcsr take sparse ones"
        raise ArgumentError(f"{name} must be a NumPy or JAX array {letters}, but {_name(array)} was given; {remedy}.")
    if not _is_of_numbers(array.dtype):
        raise ArgumentError(f"{name} must be of numbers or booleans, but its dtype is {array.dtype}.")
    if tail is None and array.ndim != 2:
        raise ArgumentError(
            f"{name} must have shape {letters}, but {list(array.shape)} was given. For a batch make one ACSR of the "
            "union of its non-zeros, and the values with `acsr.values_of(batch)`."
        )
    if tail is not None and array.shape[-2:] != tail:
        remedy = "`acsr.values_of(dense)` makes values." if name == "values" else "Build the ACSR for these lengths."
        raise ArgumentError(
            f"{name} must have shape {letters}, here [..., {tail[0]}, {tail[1]}], but {list(array.shape)} was given. "
            f"{remedy}"
        )
    return np.asarray(array) if isinstance(array, np.ndarray) else array


def _is_of_numbers(dtype: Any) -> bool:
    """Not text, times, objects, records or JAX's random keys. What NumPy lacks, such as bfloat16, is of ml_dtypes."""
    return isinstance(dtype, np.dtype) and (dtype.kind in "biufc" or dtype.type.__module__ == "ml_dtypes")


def _known(name: str, array: Array) -> np.ndarray:
    try:
        return np.asarray(array)
    except TypeError as error:
        raise ArgumentError(
            f"{name} must be known now, but a traced JAX array was given. Convert outside of jit; inside, the methods "
            "values_of, to_dense, transpose_values, to_bcoo and to_bcsr of an ACSR take traced arrays."
        ) from error


def _name(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ + (f" of shape {list(shape)}" if isinstance(shape, tuple) else "")
