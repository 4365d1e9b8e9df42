"""Operations on values in C++: `include/splat/values.hpp`, one kernel for all matrices of a dtype and head dim."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from splat import __version__
from splat.acsr import ACSR
from splat.codegen.base import accumulator
from splat.codegen.cpp import bind_jax
from splat.codegen.cpp.generate import SCALARS
from splat.codegen.xla.kernels import vary_like
from splat.codegen.xla.values import rows_by_residue
from splat.errors import UnsupportedError

Array = Any

#: What the kernels have room for.
MOST_COMPONENTS = 256

KERNELS = {
    "sddmm": "R-SDDMM: dot products for the pairs of a sparse matrix",
    "softmax": "R-softmax, row by row",
    "spmm": "R-SpMM: a sparse matrix times a dense one",
    "spmm_transposed": "R-SpMM with the transposed sparse matrix",
}


@dataclasses.dataclass(frozen=True)
class Savings:
    """What the kernels leave out; all are on but for comparison (`benchmarks`, `splat bench ablation`).

    Attributes:
      spans: span specialisation: only columns from a unit's first to its last are visited.
      anchors: poset tiling: tiles begin where rows do, and hold what they have; else a fixed grid of whole tiles.
      alignment: transformation alignment: rows of one residue together, on a lattice that is dense; else neighbours.
    """

    spans: bool = True
    anchors: bool = True
    alignment: bool = True


#: What operations use. Part of nothing that is cached: set it before functions are traced.
savings = Savings()


def source(kernel: str, dtype: str, head_dim: int) -> str:
    """The text of a kernel's translation unit. Raises KeyError for unknown names."""
    return "\n".join(
        [
            f"// splat {__version__}: {KERNELS[kernel]}; {dtype}, head dim {head_dim}.",
            '#include "splat/values_ffi.hpp"',
            "",
            "namespace {",
            "",
            "struct Facts {",
            f"  using Scalar = {SCALARS[dtype] if dtype in ('float32', 'float64') else 'splat::' + SCALARS[dtype]};",
            f"  static constexpr int head_dim = {head_dim};",
            "};",
            "",
            "}  // namespace",
            "",
            f"SPLAT_VALUES_KERNEL({kernel}, Facts)",
            "",
        ]
    )


@lru_cache(maxsize=128)
def tables(acsr: ACSR, alignment: bool = True) -> tuple[np.ndarray, ...]:
    """META, and START, COUNT, ORDER and OFFSETS of every component that has values; int32."""
    if len(acsr.components) > MOST_COMPONENTS:
        raise UnsupportedError(
            f"the cpp implementation's operations on values have room for {MOST_COMPONENTS} components, but this ACSR "
            f"has {len(acsr.components)}. Use implementation='xla'."
        )
    meta, out = [], []
    for offset, one in zip(acsr.offsets, acsr.components, strict=True):
        if not one.width:
            continue
        groups = rows_by_residue(one) if alignment else [np.arange(acsr.shape[0], dtype=np.int32)]
        meta.append((one.stride, 1, offset, one.width) if alignment else (1, one.stride, offset, one.width))
        ends = np.cumsum([0, *(len(group) for group in groups)])
        out += [one.start, one.count, np.concatenate(groups), ends]
    return tuple(np.ascontiguousarray(table, np.int32) for table in (meta, *out))


def _call(kernel: str, acsr: ACSR, head_dim: int, dtype: str, arrays: list[Array], shape: tuple[int, ...]) -> Array:
    name = f"{kernel}_{dtype}" if kernel == "softmax" else f"{kernel}_{dtype}_h{head_dim}"
    target = bind_jax.register(kernel, name, source(kernel, dtype, head_dim))
    wide = accumulator(dtype) if kernel in ("sddmm", "softmax") else dtype
    run = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, jnp.dtype(wide)), vmap_method=None)
    flags = savings.spans + 2 * savings.anchors
    operands = [vary_like(jnp.asarray(x), *arrays) for x in (*arrays, *tables(acsr, savings.alignment))]
    return vary_like(run(*operands, savings=np.float64(flags)), *operands)


def sddmm(acsr: ACSR, rows: Array, columns: Array) -> Array:
    """See `Implementation.sddmm`."""
    shape = (rows.shape[0], acsr.shape[0], acsr.width)
    return _call("sddmm", acsr, rows.shape[-1], str(rows.dtype), [rows, columns], shape)


def softmax(acsr: ACSR, values: Array) -> Array:
    """See `Implementation.softmax`."""
    return _call("softmax", acsr, 1, str(values.dtype), [values], values.shape)


def spmm(acsr: ACSR, values: Array, dense: Array) -> Array:
    """See `Implementation.spmm`."""
    shape = (values.shape[0], acsr.shape[0], dense.shape[-1])
    return _call("spmm", acsr, dense.shape[-1], str(dense.dtype), [values, dense], shape)


def spmm_transposed(acsr: ACSR, values: Array, dense: Array) -> Array:
    """See `Implementation.spmm_transposed`."""
    shape = (values.shape[0], acsr.shape[1], dense.shape[-1])
    return _call("spmm_transposed", acsr, dense.shape[-1], str(dense.dtype), [values, dense], shape)


__all__ = ["KERNELS", "Savings", "sddmm", "softmax", "source", "spmm", "spmm_transposed", "tables"]
