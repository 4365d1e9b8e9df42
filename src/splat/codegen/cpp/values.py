"""Operations on values in C++: `include/splat/values.hpp`, one kernel for all matrices of a dtype and head dim."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from splat.acsr import ACSR, Component
from splat.codegen.base import USUAL, How, accumulator, kept_with_matrix
from splat.codegen.cpp import bind_jax
from splat.codegen.cpp.generate import SCALARS, translation_unit
from splat.codegen.partitioning import vary_like
from splat.codegen.xla.values import rows_by_residue
from splat.errors import UnsupportedError

Array = Any

#: What the kernels have room for.
MOST_COMPONENTS = 256

#: Rows that the kernels compute at once, and that tiles hold; their columns come in multiples of COLUMNS.
ROWS, COLUMNS = 6, 16

KERNELS = {
    "sddmm": "R-SDDMM: dot products for the pairs of a sparse matrix",
    "softmax": "R-softmax, row by row",
    "spmm": "R-SpMM: a sparse matrix times a dense one",
    "spmm_transposed": "R-SpMM with the transposed sparse matrix",
}


def source(kernel: str, acsr: ACSR, dtype: str, head_dim: int) -> str:
    """The text of a kernel's translation unit for dense arrays of a dtype. Raises KeyError for unknown names."""
    what, result = KERNELS[kernel], SCALARS[_result(kernel, acsr, dtype)]
    if kernel == "softmax":  # of values, whatever made them
        dtype, head_dim = accumulator(dtype), 1
    entry = f"SPLAT_VALUES_KERNEL({kernel}, Facts)"
    return translation_unit(
        what, ("values_ffi.hpp",), dtype, head_dim, entry, more_facts=(f"using Result = {result};",)
    )  # fmt: skip


def _result(kernel: str, acsr: ACSR, dtype: str) -> str:
    """The dtype of what the kernel writes. Components add to products one after the other: not to rounded ones."""
    several = sum(one.width > 0 for one in acsr.components) > 1
    return dtype if "spmm" in kernel and not several else accumulator(dtype)


# -- tables ------------------------------------------------------------------------------------------------------------


@kept_with_matrix
def _tables(acsr: ACSR, how: How) -> tuple[int, tuple[np.ndarray, ...]]:
    """(values of a batch entry; META, and the tables of every component that has values: see values_ffi.hpp)."""
    if len(acsr.components) > MOST_COMPONENTS:
        raise UnsupportedError(
            f"the cpp implementation's operations on values have room for {MOST_COMPONENTS} components, but this ACSR "
            f"has {len(acsr.components)}. Use implementation='xla'."
        )
    if how.layout == "tiles" and not how.alignment:
        raise UnsupportedError("layout 'tiles' is one of aligned rows. Use layout 'rows' to compare without alignment.")
    size = 0 if how.layout == "tiles" else acsr.shape[0] * acsr.width
    meta, out = [], []
    for offset, one in zip(acsr.offsets, acsr.components, strict=True):
        if not one.width:
            continue
        groups = rows_by_residue(one) if how.alignment else [np.arange(acsr.shape[0], dtype=np.int32)]
        meta.append((one.stride, 1) if how.alignment else (1, one.stride))
        if how.layout == "tiles":
            size, places = _places_in_tiles(one, groups, size)
        else:
            place = np.arange(acsr.shape[0], dtype=np.int64) * acsr.width + offset
            places = place, np.zeros_like(place), one.width - one.count
        ends = np.cumsum([0, *(len(group) for group in groups)])
        out += [one.start, one.count, np.concatenate(groups), *places, ends]
    if size >= 2**31:
        raise UnsupportedError(
            f"the cpp implementation's operations serve up to 2**31 - 1 values in a batch entry, but this ACSR has "
            f"{size:,}. Use fewer rows at a time, or implementation='xla'."
        )
    return size, tuple(np.ascontiguousarray(table, np.int32) for table in (meta, *out))


def _places_in_tiles(component: Component, groups: list[np.ndarray], begin: int) -> tuple[int, tuple[np.ndarray, ...]]:
    """(end; PLACE, BEFORE and AFTER) where `ROWS` rows of a group lie in one tile, from their first column to the last.

    A tile of six rows, dots for padding:   . . a a a a . .
                                            . . . b b b b .
    """
    num_rows = component.count.shape[0]
    lower, upper = (
        np.append(np.broadcast_to(b, (num_rows,)), f) for b, f in zip(component.bounds, (2**30, -(2**30)), strict=True)
    )
    tiles = np.concatenate(
        [np.pad(rows, (0, -len(rows) % ROWS), constant_values=num_rows).reshape(-1, ROWS) for rows in groups]
    )
    first, last = lower[tiles].min(axis=1).astype(np.int64), upper[tiles].max(axis=1).astype(np.int64)
    width = np.maximum(-(-(last - first) // COLUMNS) * COLUMNS, 0)
    base = begin + np.concatenate([[0], np.cumsum(width * (tiles < num_rows).sum(axis=1))])
    count = np.append(component.count, 0)[tiles]
    before = np.where(count > 0, lower[tiles] - first[:, None], 0)
    place = base[:-1, None] + np.arange(ROWS) * width[:, None] + before
    by_row = []
    for table in (place, before, width[:, None] - before - count):
        rows = np.zeros(num_rows + 1, np.int64)
        rows[tiles] = table
        by_row.append(rows[:-1])
    return int(base[-1]), tuple(by_row)


def num_values(acsr: ACSR, how: How) -> int:
    """See `Implementation.num_values`."""
    return _tables(acsr, how)[0]


# -- calls -------------------------------------------------------------------------------------------------------------


def _call(kernel: str, acsr: ACSR, how: How, arrays: list[Array], shape: tuple[int, ...]) -> Array:
    dtype, head_dim = str(arrays[-1].dtype), arrays[-1].shape[-1]
    name = "_".join([kernel, dtype] + ([] if kernel == "softmax" else [f"h{head_dim}"]))
    target = bind_jax.register(kernel, name, source(kernel, acsr, dtype, head_dim))
    result = jax.ShapeDtypeStruct(shape, jnp.dtype(_result(kernel, acsr, dtype)))
    run = jax.ffi.ffi_call(target, result, vmap_method=None)
    operands = [vary_like(jnp.asarray(x), *arrays) for x in (*arrays, *_tables(acsr, how)[1])]
    return vary_like(run(*operands, savings=np.float64(how.spans + 2 * how.posets)), *operands)


def _flat(values: Array) -> Array:
    return values.reshape(values.shape[0], -1)


def sddmm(acsr: ACSR, rows: Array, columns: Array, how: How = USUAL) -> Array:
    """See `Implementation.sddmm`."""
    size, batch = num_values(acsr, how), rows.shape[0]
    values = _call("sddmm", acsr, how, [rows, columns], (batch, size))
    return values if how.layout == "tiles" else values.reshape(batch, acsr.shape[0], acsr.width)


def softmax(acsr: ACSR, values: Array, how: How = USUAL) -> Array:
    """See `Implementation.softmax`."""
    flat = _flat(values)
    return _call("softmax", acsr, how, [flat], flat.shape).reshape(values.shape)


def spmm(acsr: ACSR, values: Array, dense: Array, how: How = USUAL) -> Array:
    """See `Implementation.spmm`."""
    shape = (values.shape[0], acsr.shape[0], dense.shape[-1])
    return _call("spmm", acsr, how, [_flat(values), dense], shape).astype(dense.dtype)


def spmm_transposed(acsr: ACSR, values: Array, dense: Array, how: How = USUAL) -> Array:
    """See `Implementation.spmm_transposed`."""
    shape = (values.shape[0], acsr.shape[1], dense.shape[-1])
    return _call("spmm_transposed", acsr, how, [_flat(values), dense], shape).astype(dense.dtype)


__all__ = ["KERNELS", "num_values", "sddmm", "softmax", "source", "spmm", "spmm_transposed"]
