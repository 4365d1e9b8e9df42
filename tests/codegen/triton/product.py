"""A small differentiable operation made of launches, to try the bindings on; `reference` is the same by JAX alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from splat.codegen.triton import bind_jax
from splat.codegen.triton.launch import Kernel, Launch, Output


@triton.jit  # pyright: ignore[reportAttributeAccessIssue]
def product_kernel(
    X, W, ROWS, length, scale, Y, SUMS,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, BLOCK)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    source = tl.load(ROWS + row, mask=row < length, other=0)
    axis = tl.arange(0, HEAD)
    kept = (row < length)[:, None]
    x = tl.load(X + (batch * length + source[:, None]) * HEAD + axis[None, :], mask=kept, other=0.0)
    if DESCRIPTORS:
        w = tl.make_tensor_descriptor(W + batch * HEAD * HEAD, [HEAD, HEAD], [HEAD, 1], [HEAD, HEAD]).load([0, 0])
    else:
        w = tl.load(W + batch * HEAD * HEAD + axis[:, None] * HEAD + axis[None, :])
    if TRANSPOSED:
        w = tl.trans(w)
    y = tl.dot(x, w) * scale  # [BLOCK, HEAD]
    tl.store(Y + (batch * length + row[:, None]) * HEAD + axis[None, :], y.to(Y.dtype.element_ty), mask=kept)
    tl.store(SUMS + batch * length + row, tl.sum(y, 1), mask=row < length)


BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Program:
    """What is static about `product`."""

    scale: float = 0.5
    descriptors: bool = False


def product_launch(program: Program, x: Any, w: Any, rows: Any, *, transposed: bool = False) -> Launch:
    batch, length, width = x.shape
    return Launch(
        kernel=Kernel("product_kernel", "", product_kernel),
        programs=batch * -(-length // BLOCK),
        arrays=(x, w, rows),
        scalars=(length, program.scale),
        outputs=(Output(x.shape, str(x.dtype)), Output((batch, length), "float32")),
        constants=dict(HEAD=width, BLOCK=BLOCK, TRANSPOSED=transposed, DESCRIPTORS=program.descriptors),
        num_warps=4,
        num_stages=2,
    )


@bind_jax.vmappable("BTH BHW -> BTW BT")
def _forward(program: Program, batched: Any, shared: Any) -> Any:
    (x, w), (rows, _) = batched, shared
    return tuple(bind_jax.launch(product_launch(program, x, w, rows)))


@bind_jax.vmappable("BTH BHW BTW -> BTH BHW")
def _backward(program: Program, batched: Any, shared: Any) -> Any:
    (x, w, d_y), (rows, inverse) = batched, shared
    d_x, _ = bind_jax.launch(product_launch(program, d_y, w, inverse, transposed=True))
    d_w = program.scale * jnp.einsum("bti,btj->bij", x[:, rows], d_y, preferred_element_type=jnp.float32)
    return d_x, d_w.astype(w.dtype)


def _primal(program: Program, x: Any, w: Any, tables: Any) -> Any:
    return _forward(program)((x, w), tables)


def _fwd(program: Program, x: Any, w: Any, tables: Any) -> Any:
    return _forward(program)((x, w), tables), (x, w, tables)


def _bwd(program: Program, saved: Any, cotangents: Any) -> Any:
    x, w, tables = saved
    d_y, d_sums = cotangents
    d_y = (d_y.astype(jnp.float32) + d_sums[..., None]).astype(x.dtype)
    return (*_backward(program)((x, w, d_y), tables), None)


#: (program, x [B, T, H], w [B, H, H], tables) -> (scale * x[b, rows] @ w[b] [B, T, H], its row sums [B, T]); tables are
#: `rows`, a permutation of T, and its inverse.
product = jax.custom_vjp(_primal, nondiff_argnums=(0,))
product.defvjp(_fwd, _bwd)


def reference(program: Program, x: Any, w: Any, tables: Any) -> Any:
    """`product` by JAX alone."""
    y = program.scale * jnp.einsum("bti,bij->btj", x[:, tables[0]], w, preferred_element_type=jnp.float32)
    return y.astype(x.dtype), y.sum(-1)


def loss(x: Any, w: Any, tables: Any, program: Program = Program(), function: Any = product) -> Any:
    """A scalar that depends on both results."""
    y, sums = function(program, x, w, tables)
    return (y.astype(jnp.float32) ** 2).sum() + (sums * jnp.cos(sums)).sum()


def shapes(*leading: int, batch: int = 2, length: int = 40, width: int = 64, dtype: Any = jnp.bfloat16) -> tuple:
    """x, w and tables of `product`, as shapes; `leading` axes before those of x and w."""
    index = jax.ShapeDtypeStruct((length,), jnp.int32)
    x = jax.ShapeDtypeStruct((*leading, batch, length, width), dtype)
    w = jax.ShapeDtypeStruct((*leading, batch, width, width), dtype)
    return x, w, (index, index)
