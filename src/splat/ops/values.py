"""The paper's three operations on values of a sparse matrix: R-SDDMM, R-softmax, R-SpMM (section 3), and a transposed
product.

The products are bilinear, and each is the others' derivative, so that they are JAX primitives with those rules: forward
and reverse mode, of any order, are made of the same kernels.

    C = sddmm(A, B)            dA = spmm(dC, B)               dB = spmm_transposed(dC, A)
    Y = spmm(P, B)             dP = sddmm(dY, B)              dB = spmm_transposed(P, dY)
    Y = spmm_transposed(P, A)  dP = sddmm(A, dY)              dA = spmm(P, dY)
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from splat.acsr import ACSR
from splat.codegen import Request, choose
from splat.codegen.base import OPERATIONS, USUAL, How, accumulator, made_of
from splat.codegen.batching import repeat, spread
from splat.codegen.devices import platform_of
from splat.codegen.partitioning import Axes, alike, vary_like
from splat.codegen.registry import load
from splat.errors import ArgumentError
from splat.ops import validate

Array = Any


def sddmm(query: Any, key: Any, acsr: ACSR, *, layout: str = "rows", implementation: str | None = None) -> Array:
    """R-SDDMM: `query @ key.T` for the pairs of a sparse matrix only (sampled dense-dense matrix product).

    Args:
      query: [..., T, H], float32, bfloat16, float16 or float64.
      key: [..., S, H], of the same dtype. Leading axes broadcast.
      acsr: the pairs, T x S; see `splat.build`.
      layout: of the values: "rows", or "tiles" [..., size] in the order of the implementation's own tiles, which saves
        the padding of rows of unequal length; all operations on the values must then be the same implementation's.
      implementation: "triton" (GPUs), "cpp" (CPUs), "xla", or None for the best that can serve.

    Returns:
      values [..., T, acsr.width], float32 (float64 for float64): `acsr.columns()` says which column each belongs to;
      padding is 0. Multiply `query` by the scale that scores are to have.

    Raises:
      ArgumentError, UnsupportedError: before anything is compiled.

    >>> import jax, splat
    >>> acsr = splat.build(splat.causal() & splat.window(2), 5)
    >>> splat.sddmm(jax.numpy.ones((5, 4)), jax.numpy.ones((5, 4)), acsr)[:2]
    Array([[4., 0., 0.],
           [4., 4., 0.]], dtype=float32)
    """
    acsr = validate.check_acsr(acsr)
    query, key = _arrays(query=query, key=key)
    _check_dense("query", query, acsr.shape[0], "rows")
    _check_dense("key", key, acsr.shape[1], "columns")
    if query.dtype != key.dtype or query.shape[-1] != key.shape[-1]:
        raise ArgumentError(
            f"query and key must agree in dtype and head dim (the last axis), but {query.dtype}{list(query.shape)} and "
            f"{key.dtype}{list(key.shape)} were given"
        )
    return _bind(_sddmm_p, acsr, query, key, ("query", "key"), layout, implementation)


def softmax(values: Any, acsr: ACSR, *, layout: str = "rows", implementation: str | None = None) -> Array:
    """R-softmax: of each row, over the pairs of a sparse matrix.

    Args:
      values: [..., T, acsr.width], or [..., size] in tiles; float32 or float64 (16-bit ones become float32).
      acsr, layout, implementation: as in `sddmm`.

    Returns:
      values like those given; rows without any pair, and padding, are 0. Padding is not read.

    Raises:
      ArgumentError, UnsupportedError: before anything is compiled.
    """
    acsr = validate.check_acsr(acsr)
    (values,) = _arrays(values=values)
    values = values.astype(accumulator(values.dtype))
    static = _choose(values, str(values.dtype), 1, acsr, layout, implementation)
    _check_values(values, static)
    return _softmax(static, values)


def spmm(values: Any, acsr: ACSR, dense: Any, *, layout: str = "rows", implementation: str | None = None) -> Array:
    """R-SpMM: the sparse matrix of the values times a dense one.

    Args:
      values: [..., T, acsr.width], or [..., size] in tiles; float32 for a `dense` of up to 32 bits, else float64
        (others are converted).
      acsr, layout, implementation: as in `sddmm`.
      dense: [..., S, H], float32, bfloat16, float16 or float64. Leading axes broadcast.

    Returns:
      [..., T, H] in `dense`'s dtype; sums are made in the values' dtype. Padding is not read.

    Raises:
      ArgumentError, UnsupportedError: before anything is compiled.
    """
    return _product(_spmm_p, values, acsr, dense, 1, layout, implementation)


def spmm_transposed(
    values: Any, acsr: ACSR, dense: Any, *, layout: str = "rows", implementation: str | None = None
) -> Array:
    """The transposed sparse matrix of the values times a dense one: [..., T, H] -> [..., S, H]; else as `spmm`."""
    return _product(_spmm_transposed_p, values, acsr, dense, 0, layout, implementation)


def _product(primitive, values: Any, acsr: ACSR, dense: Any, axis: int, layout: str, implementation) -> Array:
    acsr = validate.check_acsr(acsr)
    values, dense = _arrays(values=values, dense=dense)
    _check_dense("dense", dense, acsr.shape[axis], ("rows", "columns")[axis])
    values = values.astype(accumulator(dense.dtype))
    return _bind(primitive, acsr, values, dense, ("values", "dense"), layout, implementation)


@contextlib.contextmanager
def without(*specialisations: str) -> Iterator[None]:
    """Operations on values that are called or traced meanwhile go without some of the paper's specialisations.

    Args:
      specialisations: of "spans", "posets" and "alignment"; see `splat.codegen.base.How`. "xla" has none.
    """
    known = ("spans", "posets", "alignment")
    if unknown := sorted(set(specialisations) - set(known)):
        raise ArgumentError(f"specialisations must be of {', '.join(known)}, but {', '.join(unknown)} was given")
    token = _off.set(_off.get() | frozenset(specialisations))
    try:
        yield
    finally:
        _off.reset(token)


_off: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("splat_without", default=frozenset())


# -- arguments ---------------------------------------------------------------------------------------------------------


def _arrays(**given: Any) -> list[Array]:
    out = []
    for name, x in given.items():
        array = x if isinstance(x, jax.Array) else jnp.asarray(x)
        validate.check_dtype(name, array)
        out.append(array)
    return out


def _check_dense(name: str, array: Array, length: int, what: str) -> None:
    if array.ndim < 2 or array.shape[-2] != length or array.shape[-1] == 0:
        raise ArgumentError(
            f"{name} must have shape [..., {length}, head dim], because acsr has {length} {what}, but "
            f"{list(array.shape)} was given. Positions come last but one: [B, T, N, H] needs swapaxes(1, 2)."
        )


def _check_values(values: Array, static: _Static) -> int:
    """How many axes of values are not leading ones."""
    wanted = static.values_shape
    if values.shape[-len(wanted) :] != wanted:
        text = "".join(f", {n}" for n in wanted)
        raise ArgumentError(
            f"values must have shape [...{text}] for this acsr and layout {static.how.layout!r}, but "
            f"{list(values.shape)} was given. acsr.values_of(dense) makes values of a dense matrix, in rows."
        )
    return len(wanted)


def _choose(array: Array, dtype: str, head_dim: int, acsr: ACSR, layout: str, implementation: str | None) -> _Static:
    if layout not in ("rows", "tiles"):
        raise ArgumentError(f"layout must be 'rows' or 'tiles', but {layout!r} was given")
    chosen = choose(Request(platform_of(array), dtype, head_dim), implementation)
    how, shape = How(layout, **dict.fromkeys(_off.get(), False)), (acsr.shape[0], acsr.width)
    if how != USUAL:
        size = chosen.num_values(acsr, how)
        shape = (size,) if layout == "tiles" else shape
    return _Static(acsr, chosen.name, chosen.target(), how, shape)


def _bind(
    primitive, acsr: ACSR, left: Array, right: Array, names: tuple[str, str], layout: str, implementation
) -> Array:
    static = _choose(left, str(right.dtype), right.shape[-1], acsr, layout, implementation)
    own = _check_values(left, static) if names[0] == "values" else 2
    try:
        leading = jnp.broadcast_shapes(left.shape[:-own], right.shape[:-2])
    except ValueError:
        raise ArgumentError(
            f"the leading axes of {names[0]} {list(left.shape)} and {names[1]} {list(right.shape)} must broadcast"
        ) from None
    left, right = (jnp.broadcast_to(x, (*leading, *x.shape[-n:])) for x, n in ((left, own), (right, 2)))
    return _call(primitive, static, left, right, names=names)


# -- primitives: operands and results have the same leading axes -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is static about a call.

    Attributes:
      target: of the implementation, which may change what it makes.
      values_shape: of one batch entry.
    """

    acsr: ACSR
    implementation: str
    target: str
    how: How
    values_shape: tuple[int, ...]


def _axes(name: str, static: _Static) -> Axes:
    values = "BTW" if len(static.values_shape) == 2 else "BW"
    return Axes.parse(
        {
            "sddmm": f"BTH BSH -> {values}",
            "softmax": f"{values} -> {values}",
            "spmm": f"{values} BSH -> BTH",
            "spmm_transposed": f"{values} BTH -> BSH",
        }[name]
    )


def _run(name: str, static: _Static, *arrays: Array) -> Array:
    """What the implementation computes; zeros where there is nothing to compute."""
    implementation, how = load(static.implementation), () if static.how == USUAL else (static.how,)

    def operation(arrays: Sequence[Array], _: None) -> tuple[Array]:
        result = _shape(name, static, *arrays)
        if 0 in result.shape or not static.acsr.nnz:
            return (vary_like(jnp.zeros(result.shape, result.dtype), *arrays),)
        return (getattr(implementation, name)(static.acsr, *arrays, *how),)

    return spread(operation, _axes(name, static), arrays, opaque=implementation.opaque)[0]


def _shape(name: str, static: _Static, *arrays: Any) -> jax.ShapeDtypeStruct:
    """Of the result of arrays that have one leading axis."""
    last = arrays[-1]
    if name in ("sddmm", "softmax"):
        return jax.ShapeDtypeStruct((last.shape[0], *static.values_shape), jnp.dtype(accumulator(last.dtype)))
    rows = static.acsr.shape[0 if name == "spmm" else 1]
    return jax.ShapeDtypeStruct((last.shape[0], rows, last.shape[-1]), last.dtype)


def _jitted(name: str, static: _Static) -> Any:
    return made_of(static.acsr)((name, static), lambda: jax.jit(partial(_run, name, static)))


def _primitive(name: str) -> Primitive:
    """A primitive `splat_<name>` that calls the implementation's method `name`.

    It holds the program that it becomes, so that JAX finds in there what is split over devices.
    """
    primitive = Primitive(f"splat_{name}")

    def batch(arrays: Any, axes: Any, *, static: _Static, program: ClosedJaxpr) -> tuple[Array, int]:
        del program
        size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
        mapped = (x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(arrays, axes, strict=True))
        repeated = (repeat(size, x, axis is not None) for x, axis in zip(mapped, axes, strict=True))
        return _call(primitive, static, *repeated), 0

    def lowered(*arrays: Array, static: _Static, program: ClosedJaxpr) -> Array:
        del static
        return jaxpr_as_fun(program)(*arrays)[0]

    primitive.def_impl(lambda *arrays, static, program: _jitted(name, static)(*arrays))
    primitive.def_abstract_eval(lambda *avals, static, program: program.out_avals[0])
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(lowered, multiple_results=False))
    return primitive


def _call(primitive: Primitive, static: _Static, *arrays: Array, names: Sequence[str] = ()) -> Array:
    """The operation; who gives the arrays knows them by their `names`."""
    name = primitive.name.removeprefix("splat_")
    arrays = alike(_axes(name, static).of(arrays), *arrays, names=names)
    if not any(isinstance(x, Tracer) for x in arrays):
        return _jitted(name, static)(*arrays)
    return primitive.bind(*arrays, static=static, program=jax.make_jaxpr(_jitted(name, static))(*arrays))


_sddmm_p, _softmax_p, _spmm_p, _spmm_transposed_p = map(_primitive, OPERATIONS)

ad.defbilinear(
    _sddmm_p,
    lambda ct, query, key, *, static, program: _call(_spmm_p, static, ct, key),
    lambda ct, query, key, *, static, program: _call(_spmm_transposed_p, static, ct, query),
)
ad.defbilinear(
    _spmm_p,
    lambda ct, values, dense, *, static, program: _call(_sddmm_p, static, ct, dense),
    lambda ct, values, dense, *, static, program: _call(_spmm_transposed_p, static, values, ct),
)
ad.defbilinear(
    _spmm_transposed_p,
    lambda ct, values, dense, *, static, program: _call(_sddmm_p, static, dense, ct),
    lambda ct, values, dense, *, static, program: _call(_spmm_p, static, values, ct),
)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _softmax(static: _Static, values: Array) -> Array:
    return _call(_softmax_p, static, values, names=("values",))


@_softmax.defjvp
def _softmax_jvp(static: _Static, primals: Any, tangents: Any) -> tuple[Array, Array]:
    out = _softmax(static, *primals)
    # Padding has weight 0; what its tangent holds is not looked at.
    tangent = jnp.where(out == 0, 0, tangents[0])
    return out, out * (tangent - _sums_of_rows(static, out * tangent))


def _sums_of_rows(static: _Static, values: Array) -> Array:
    """The sum of each row, where each of its values is (or to be broadcast there)."""
    if static.how.layout == "rows":
        return jnp.sum(values, axis=-1, keepdims=True)
    ones = jnp.ones((*values.shape[:-1], static.acsr.shape[1], 1), values.dtype)
    return _call(_sddmm_p, static, _call(_spmm_p, static, values, ones), ones)


__all__ = ["sddmm", "softmax", "spmm", "spmm_transposed", "without"]
