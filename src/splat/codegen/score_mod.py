"""Score modification: a function of one score and of where it lies, as a program that an implementation builds in.

A `score_mod(score, batch, head, q_idx, kv_idx)` is traced with scalars in every call, so that what it computes counts,
not its name or identity: equal programs share what is compiled. Arrays that it closes over become operands, which may
be traced and have gradients. A bias is a program of this kind, too: it adds an element of an array.

The signature is FlexAttention's (Dong et al., arXiv 2412.05496).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun, subjaxprs

from splat.codegen.partitioning import vary_like, varying
from splat.errors import ArgumentError, UnsupportedError

Array = Any


class Place(NamedTuple):
    """The operands of a score modification in one call.

    Attributes:
      batch, heads: int32 [B] and [N], which batch entry and query head of the whole call each one is.
      offset: int32 [], the position of row 0.
      arrays: what the function closes over.
    """

    batch: Array
    heads: Array
    offset: Array
    arrays: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class ScoreMod:
    """The program of a score modification: equal ones compute the same of the same operands.

    Attributes:
      meaning: what the program computes, as a value.
      program: (score, batch, head, row, column, offset) -> score, all scalars, row 0 the first query; what it closes
        over are its constants.
    """

    meaning: Hashable = dataclasses.field(repr=False)
    program: Jaxpr = dataclasses.field(compare=False)

    @property
    def arrays(self) -> list[jax.ShapeDtypeStruct]:
        """What it closes over."""
        return _shapes(self.program.constvars)

    @property
    def scalars(self) -> list[jax.ShapeDtypeStruct]:
        """The program's arguments."""
        return _shapes(self.program.invars)

    @property
    def learns(self) -> bool:
        """Whether anything that it closes over may have a gradient."""
        return any(jnp.issubdtype(x.dtype, jnp.floating) for x in self.arrays)

    def of_tile(self, place: Place, scores: Array, *where: Array) -> Array:
        """The modified scores of a tile.

        Args:
          scores: [R, B, K, G, Q, X].
          where: int32, batch entry, head, query and key that each score is of, each axis whole or of length 1; queries
            count from the first.
        """
        given = scores, *where, place.offset.reshape((1,) * 6)
        given = tuple(vary_like(x, *given, *place.arrays) for x in given)
        run: Callable[..., Array] = partial(_computed, self.program, place.arrays)
        for axis, length in reversed(list(enumerate(scores.shape))):
            if length != 1:
                run = jax.vmap(run, [None if x.shape[axis] == 1 else 0 for x in given])
        kept = (lax.squeeze(x, [axis for axis, length in enumerate(x.shape) if length == 1]) for x in given)
        return run(*kept).reshape(scores.shape)


def _shapes(variables: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in variables]


def _computed(program: Jaxpr, constants: Sequence[Array], *given: Array) -> Array:
    if not any(map(varying, (*given, *constants))):
        return jaxpr_as_fun(ClosedJaxpr(program, constants))(*given)[0]
    # Inside shard_map a step's operands must vary alike, and the program was traced outside.
    return _stepwise(program, constants, given, lambda x: vary_like(x, *given, *constants))[0]


def _stepwise(
    program: Jaxpr, constants: Sequence[Array], given: Sequence[Array], operand: Callable[[Array], Array]
) -> list[Array]:
    """The program's results, `operand` made of everything that goes into a step; derivatives are the steps' own."""
    known = dict(zip((*program.constvars, *program.invars), (*constants, *given), strict=True))

    def value(x: Any) -> Array:
        return jnp.asarray(number(x)) if isinstance(x, Literal) else known[x]

    for step in program.eqns:
        operands = [operand(value(x)) for x in step.invars]
        if step.primitive.name == "custom_vjp_call":
            raise UnsupportedError(
                "score_mod: inside jax.shard_map a function with a derivative of its own (jax.custom_vjp) is not "
                "served where arrays that differ between devices are closed over, nor by the xla implementation."
            )
        if step.primitive.name in ("pvary", "pcast"):
            made = operands
        elif (inner := called(step)) is not None:
            made = _stepwise(inner.jaxpr, inner.consts, operands, operand)
        else:
            made = step.primitive.bind(*operands, **step.params)
            made = made if step.primitive.multiple_results else [made]
        known.update(zip(step.outvars, made, strict=True))
    return list(map(value, program.outvars))


#: Steps that do no more than call a program: the parameters that hold it.
_CALLS = {
    **dict.fromkeys(("jit", "pjit", "checkpoint", "remat", "remat2"), "jaxpr"),
    **dict.fromkeys(("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
}


def number(literal: Any) -> np.ndarray[Any, Any]:
    """A number that a program has in its text."""
    return np.asarray(literal.val, literal.aval.dtype)


def called(step: Any) -> ClosedJaxpr | None:
    """The program that a step calls, where it does no more than that."""
    inner = step.params.get(_CALLS.get(step.primitive.name))
    return ClosedJaxpr(inner, ()) if isinstance(inner, Jaxpr) else inner


def trace(score_mod: Callable[..., Any] | None, bias: Array | None, dtype: str) -> tuple[ScoreMod, tuple[Array, ...]]:
    """The program, and what it closes over.

    Args:
      score_mod: (score, batch, head, q_idx, kv_idx) -> score, or None for none.
      bias: [B or 1, N or 1, T or 1, S or 1], added afterwards, or None for none.
      dtype: of scores.

    Raises:
      ArgumentError: the function takes or gives something else, or does something besides.
    """
    if score_mod is not None:
        _check_takes_five(score_mod)

    def program(score: Array, batch: Array, head: Array, row: Array, column: Array, offset: Array) -> Array:
        if score_mod is not None:
            score = _check_score(score_mod(score, batch, head, row + offset, column)).astype(dtype)
        if bias is not None:
            at = (batch, head, row, column)
            index = tuple(jnp.zeros_like(n) if size == 1 else n for n, size in zip(at, bias.shape, strict=True))
            score = score + lax.dynamic_slice(bias, index, (1, 1, 1, 1)).reshape(()).astype(dtype)
        return score

    scalars = jax.ShapeDtypeStruct((), dtype), *(jax.ShapeDtypeStruct((), jnp.int32),) * 5
    try:
        traced = jax.make_jaxpr(program)(*scalars)
    except Exception as error:
        if type(error).__name__ != "ShardingTypeError":  # which JAX does not export
            raise
        raise ArgumentError(
            "score_mod must close over arrays that are whole on every device, but reads elements of one that is "
            "sharded over explicit mesh axes. Use jax.sharding.reshard(array, jax.P()) first."
        ) from error
    if traced.effects:
        raise ArgumentError(
            "score_mod must compute a score and do nothing else, but it has side effects (such as jax.debug.print). "
            "Take them out."
        )
    constants, made = tuple(map(jnp.asarray, traced.consts)), traced.jaxpr
    if any(map(varying, constants)):  # inside shard_map: the same of arrays that do not vary

        def alike(constants: Sequence[Array], *given: Array) -> list[Array]:
            return _stepwise(traced.jaxpr, constants, given, lambda x: x)

        plain = jax.make_jaxpr(alike)(_shapes(made.constvars), *scalars)
        inner, count = plain.jaxpr, len(constants)
        constants += tuple(map(jnp.asarray, plain.consts))  # of functions that are jitted themselves
        made = inner.replace(constvars=[*inner.invars[:count], *inner.constvars], invars=inner.invars[count:])
    return ScoreMod(_meaning(made), made), constants


def _check_takes_five(score_mod: Any) -> None:
    expected = "score_mod must be a function (score, batch, head, q_idx, kv_idx) -> score"
    if not callable(score_mod):
        raise ArgumentError(f"{expected}, but {type(score_mod).__name__} was given")
    try:
        signature = inspect.signature(score_mod)
    except ValueError:  # a builtin, which has none
        return
    try:
        signature.bind(*range(5))
    except TypeError:
        raise ArgumentError(f"{expected}, but a function of {signature} was given") from None


def _check_score(made: Any) -> Array:
    expected = "score_mod must return one floating-point number for one score"
    try:
        array = jnp.asarray(made)
    except (TypeError, ValueError):
        raise ArgumentError(f"{expected}, but it returned {type(made).__name__}") from None
    if array.shape or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ArgumentError(f"{expected}, but it returned {array.dtype}{list(array.shape)}")
    return array


# -- what a program computes, as a value -------------------------------------------------------------------------------


class _Itself:
    """Something without a value: equal to itself."""

    def __init__(self, it: Any):
        self.it = it

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Itself) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


#: Of functions with derivatives of their own: parameters that are functions, made anew whenever they are traced.
_RULES = {"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees"}


def _meaning(program: Jaxpr) -> Hashable:
    """Equal for programs that compute the same, and the same gradients, in the same steps, of the same numbers."""
    meaning = _steps_of(program)
    if not _has_rules(program):
        return meaning

    def gradients(constants: Any, *scalars: Any) -> Any:
        out, backward = jax.vjp(lambda *x: jaxpr_as_fun(ClosedJaxpr(program, x[0]))(*x[1:])[0], constants, *scalars)
        return [x for x in jax.tree.leaves(backward(jnp.ones_like(out))) if x.dtype != jax.dtypes.float0]

    try:
        traced = jax.make_jaxpr(gradients)(_shapes(program.constvars), *_shapes(program.invars))
    except (TypeError, ValueError, NotImplementedError):  # it has none
        return meaning, _Itself(program)
    return meaning, _steps_of(traced.jaxpr), _value(tuple(traced.consts))


def _has_rules(program: Jaxpr) -> bool:
    """Whether a function within it has a derivative of its own."""
    return any(_RULES & step.params.keys() for step in program.eqns) or any(map(_has_rules, subjaxprs(program)))


def _steps_of(program: Jaxpr) -> Hashable:
    names: dict[Any, int] = {}

    def name(x: Any) -> Hashable:
        if isinstance(x, Literal):
            return _value(np.asarray(x.val)), _kind(x.aval)
        return names.setdefault(x, len(names)), _kind(x.aval)

    steps = [tuple(map(name, (*program.constvars, *program.invars)))]
    for step in program.eqns:
        parameters = tuple((key, _value(step.params[key])) for key in sorted(step.params.keys() - _RULES))
        steps.append((step.primitive.name, parameters, *map(name, (*step.invars, *step.outvars))))
    return tuple(steps), tuple(map(name, program.outvars))


def _kind(aval: Any) -> Hashable:
    return getattr(aval, "shape", None), str(getattr(aval, "dtype", aval)), getattr(aval, "weak_type", False)


def _value(x: Any) -> Hashable:
    """A parameter of a step as something that can be compared and hashed."""
    if isinstance(x, ClosedJaxpr):
        return _steps_of(x.jaxpr), _value(tuple(x.consts))
    if isinstance(x, Jaxpr):
        return _steps_of(x)
    if isinstance(x, (tuple, list)):
        return type(x), tuple(map(_value, x))
    if isinstance(x, dict):
        return tuple((key, _value(value)) for key, value in x.items())
    if isinstance(x, (np.ndarray, np.generic)):
        return x.shape, str(x.dtype), x.tobytes()
    try:
        hash(x)
    except TypeError:
        return _Itself(x)
    return type(x), x


__all__ = ["Place", "ScoreMod", "called", "number", "trace"]
