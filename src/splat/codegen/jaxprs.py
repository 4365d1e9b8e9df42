"""From JAX's programs of scalars (`splat.codegen.score_mod`) to `splat.codegen.scalars`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.lax import GatherScatterMode

from splat.codegen.base import accumulator
from splat.codegen.scalars import FIELDS, Builder, Element, Function, Modification, Scalar, Unspeakable
from splat.codegen.score_mod import ScoreMod, called, number


@lru_cache(maxsize=256)
def modification(mod: ScoreMod, dtype: str) -> Modification:
    """What kernels of a dtype make of scores. Raises Unspeakable."""
    wide, arrays = accumulator(dtype), mod.arrays
    if not all(isinstance(n, int) for x in arrays for n in x.shape):
        raise Unspeakable("closes over an array (or has a bias) with an axis of symbolic length")

    def value(arrays: Sequence[Any], *scalars: Any) -> Any:
        return jaxpr_as_fun(ClosedJaxpr(mod.program, tuple(arrays)))(*scalars)[0]

    def with_slope(arrays: Sequence[Any], score: Any, *others: Any) -> Any:
        out, slope = jax.vjp(lambda score: value(arrays, score, *others), score)
        return out, slope(jnp.ones((), wide))[0]

    return Modification(
        tuple(str(x.dtype) for x in arrays), *(_function(f, mod, wide) for f in (value, with_slope))
    )  # fmt: skip


def refusal(name: str, mod: ScoreMod, dtype: str) -> str | None:
    """Why an implementation's kernels cannot be made with it, as one sentence with the remedy; None where they can."""
    try:
        modification(mod, dtype)
    except Unspeakable as reason:
        return (
            f"score_mod {reason}, and the {name} implementation has no text for that. Use implementation='xla', or "
            "None for the best that can serve."
        )
    return None


def _function(function: Callable[..., Any], mod: ScoreMod, wide: str) -> Function:
    traced = jax.make_jaxpr(function)(mod.arrays, *mod.scalars)
    walk = _Walk(Builder(wide))
    views = [
        _View(n, str(x.dtype), math.prod(x.shape), x.shape, _steps(x.shape)) for n, x in enumerate(mod.arrays)
    ]  # fmt: skip
    given = [*views, *map(walk.builder.field, FIELDS)]
    results = walk.program(traced.jaxpr, list(map(walk.constant, traced.consts)), given)
    return walk.builder.function(*map(walk.scalar, results))


@dataclasses.dataclass(frozen=True)
class _View:
    """Some elements of an array that the program closes over, not read yet.

    Attributes:
      array, dtype, size: its number, and the dtype and number of its elements.
      shape, steps: of the view's axes: their lengths, and elements from one index to the next.
      chosen: (index, step) of each axis from which one has been taken.
    """

    array: int
    dtype: str
    size: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    chosen: tuple[tuple[Scalar, int], ...] = ()

    def without(self, axes: Sequence[int]) -> _View:
        """Without axes of length 1."""
        kept = [n for n in range(len(self.shape)) if n not in axes]
        shape, steps = (tuple(numbers[n] for n in kept) for numbers in (self.shape, self.steps))
        return dataclasses.replace(self, shape=shape, steps=steps)


#: What a program computes: a scalar, a view of an array, or a row of scalars, such as the indices of a gather.
_Value = Any


def _steps(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))


class _Walk:
    """Along the steps of a program."""

    def __init__(self, builder: Builder):
        self.builder = builder

    def program(self, program: Jaxpr, constants: Sequence[_Value], given: Sequence[_Value]) -> list[_Value]:
        known: dict[Any, _Value] = dict(zip((*program.constvars, *program.invars), (*constants, *given), strict=True))

        def value(x: Any) -> _Value:
            return self.constant(number(x)) if isinstance(x, Literal) else known[x]

        for step in program.eqns:
            made = self._step(step, list(map(value, step.invars)))
            known.update(zip(step.outvars, made, strict=True))
        return list(map(value, program.outvars))

    def constant(self, given: Any) -> _Value:
        array = np.asarray(given)
        if array.size > 8 or array.ndim > 1:
            raise Unspeakable(f"computes with a constant array {list(array.shape)}")
        row = tuple(self.builder.number(self.builder.kind(x.dtype), x) for x in array.reshape(-1))
        return row if array.ndim else row[0]

    def scalar(self, value: _Value) -> Scalar:
        """A value that is one number, read where it is an array's."""
        if isinstance(value, tuple) and len(value) == 1:
            return value[0]
        if isinstance(value, Scalar):
            return value
        if not isinstance(value, _View) or math.prod(value.shape) != 1:
            raise Unspeakable("computes with an array")
        kind = "real" if value.dtype in ("bfloat16", "float16") else self.builder.kind(value.dtype)
        indices, steps = zip(*value.chosen, strict=True) if value.chosen else ((), ())
        return self.builder.element(kind, Element(value.array, value.dtype, value.size, steps), indices)

    def _step(self, step: Any, given: list[_Value]) -> list[_Value]:
        name, parameters = step.primitive.name, step.params
        if (inner := called(step)) is not None:
            return self.program(inner.jaxpr, list(map(self.constant, inner.consts)), given)
        if step.effects or len(step.outvars) != 1:
            raise Unspeakable(f"uses {name}")
        made = step.outvars[0].aval
        if name in _OF_ARRAYS:
            return [_OF_ARRAYS[name](self, parameters, made, *given)]
        if made.shape:
            raise Unspeakable(f"uses {name} with an array as its result")
        return [self.builder.compute(name, list(map(self.scalar, given)), made.dtype, **parameters)]

    def reshape(self, _: Any, made: Any, given: _Value, *more: _Value) -> _Value:
        """Axes of length 1 may come and go, no others."""
        if isinstance(given, _View):
            left = given.without([n for n, size in enumerate(given.shape) if size == 1])
            if left.shape != tuple(size for size in made.shape if size != 1):
                raise Unspeakable("reshapes an array")
            steps = iter(left.steps)
            return dataclasses.replace(
                left, shape=made.shape, steps=tuple(0 if size == 1 else next(steps) for size in made.shape)
            )
        if more or math.prod(made.shape) != (len(given) if isinstance(given, tuple) else 1) or len(made.shape) > 1:
            raise Unspeakable("makes an array")
        row = given if isinstance(given, tuple) else (given,)
        return row if made.shape else row[0]

    def convert(self, parameters: Any, made: Any, given: _Value) -> _Value:
        if isinstance(given, tuple):
            return tuple(self.convert(parameters, made, one) for one in given)
        return self.builder.converted(self.scalar(given), made.dtype)

    def concatenate(self, _: Any, made: Any, *given: _Value) -> _Value:
        if not all(isinstance(x, tuple) for x in given):
            raise Unspeakable("concatenates arrays")
        return sum(given, ())

    def transpose(self, parameters: Any, _: Any, given: _Value) -> _Value:
        if not isinstance(given, _View):
            raise Unspeakable("transposes an array")
        order = parameters["permutation"]
        shape, steps = (tuple(numbers[n] for n in order) for numbers in (given.shape, given.steps))
        return dataclasses.replace(given, shape=shape, steps=steps)

    def slice(self, parameters: Any, made: Any, given: _Value) -> _Value:
        starts = parameters["start_indices"]
        if isinstance(given, tuple):
            return given[starts[0] : parameters["limit_indices"][0] : (parameters["strides"] or (1,))[0]]
        if not isinstance(given, _View):
            raise Unspeakable("cuts an array")
        strides = parameters["strides"] or (1,) * len(starts)
        chosen = tuple(
            (self.builder.number("whole", start), step)
            for start, step in zip(starts, given.steps, strict=True) if start
        )  # fmt: skip
        steps = tuple(step * stride for step, stride in zip(given.steps, strides, strict=True))
        return dataclasses.replace(given, shape=made.shape, steps=steps, chosen=given.chosen + chosen)

    def dynamic_slice(self, _: Any, made: Any, given: _Value, *starts: _Value) -> _Value:
        if not isinstance(given, _View):
            raise Unspeakable("cuts an array")
        chosen = [
            (self.builder.within(self.scalar(start), length - size), step)
            for size, length, step, start in zip(made.shape, given.shape, given.steps, starts, strict=True)
            if length > size
        ]
        return dataclasses.replace(given, shape=made.shape, chosen=(*given.chosen, *chosen))

    def gather(self, parameters: Any, made: Any, given: _Value, indices: _Value) -> _Value:
        """Of one element."""
        numbers, sizes = parameters["dimension_numbers"], parameters["slice_sizes"]
        if not isinstance(given, _View) or made.shape or math.prod(sizes) != 1:
            raise Unspeakable("gathers more than one element")
        if numbers.operand_batching_dims or len(numbers.start_index_map) != len(given.shape):
            raise Unspeakable("gathers by other indices than one for each axis")
        row = indices if isinstance(indices, tuple) else (self.scalar(indices),)
        chosen, inside = [], None
        for axis, one in zip(numbers.start_index_map, row, strict=True):
            within = self.builder.within(one, given.shape[axis] - 1)
            chosen.append((within, given.steps[axis]))
            if parameters["mode"] == GatherScatterMode.FILL_OR_DROP:
                same = self.builder.compute("eq", [within, one], "bool")
                inside = same if inside is None else self.builder.compute("and", [inside, same], "bool")
        read = self.scalar(dataclasses.replace(given, shape=(), steps=(), chosen=(*given.chosen, *chosen)))
        if inside is None:
            return read
        fill = parameters["fill_value"]
        if fill is None:
            fill = _FILLS[made.dtype.kind](made.dtype) if made.dtype.kind in _FILLS else np.nan
        return self.builder.chosen(inside, read, self.builder.number(read.kind, fill))


#: By a dtype's kind: what JAX says lies outside of an array, NaN of all others.
_FILLS: dict[str, Callable[[Any], Any]] = {
    "i": lambda dtype: np.iinfo(dtype).min,
    "u": lambda dtype: np.iinfo(dtype).max,
    "b": lambda _: True,
}

_OF_ARRAYS: dict[str, Callable[..., _Value]] = {
    **dict.fromkeys(("reshape", "squeeze", "broadcast_in_dim", "expand_dims"), _Walk.reshape),
    "convert_element_type": _Walk.convert,
    **{name: getattr(_Walk, name) for name in ("concatenate", "transpose", "slice", "dynamic_slice", "gather")},
}

__all__ = ["modification", "refusal"]
