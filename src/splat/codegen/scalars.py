"""Programs of scalars: what a score modification computes, between who traces it and the language of a kernel.

A program is straight-line code. Every step makes one scalar of others, or reads an element of an array that the
modification closes over. It is plain data, the same for JAX and for PyTorch: who traces a function makes it with a
`Builder`, by the names that JAX has for operations, and a `Language` spells it line by line.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

#: What a program is given: the score, its batch entry and head in the whole call, the query's row (its index, the first
#: is 0) and key, and the position of row 0. The score is real, the others are whole.
FIELDS = ("score", "batch", "head", "row", "column", "offset")

#: Integers that are computed in wider ones.
NARROW = ("int8", "int16", "uint8", "uint16")


class Unspeakable(Exception):
    """What a program does that has no text in kernels, as a verb and its object."""


@dataclasses.dataclass(frozen=True)
class Scalar:
    """One of FIELDS, the name of an earlier step, or a number; "real", "whole" or "condition"."""

    kind: str
    value: str | float | bool

    @property
    def known(self) -> bool:
        """Whether it is a number."""
        return not isinstance(self.value, str)


@dataclasses.dataclass(frozen=True)
class Element:
    """Which element of an array: the sum of indices times steps.

    Attributes:
      array, dtype, size: its number, and the dtype and number of its elements.
      steps: elements from one value of each index to the next.
    """

    array: int
    dtype: str
    size: int
    steps: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """How one scalar is made.

    Attributes:
      scalar: the result: its kind and name.
      does: an operator ("+", and with one operand "-" or "~"), or a function's name; "" where an element is read.
      given: operands; of an element its indices.
      parameter: of some functions (bits of a shift, an exponent, or the dtype of a narrow integer), or the element.
    """

    scalar: Scalar
    does: str
    given: tuple[Scalar, ...]
    parameter: int | str | Element | None = None


@dataclasses.dataclass(frozen=True)
class Function:
    steps: tuple[Step, ...]
    results: tuple[Scalar, ...]


@dataclasses.dataclass(frozen=True)
class Modification:
    """What becomes of a score: equal ones make the same kernel.

    Attributes:
      arrays: the dtypes of what it closes over.
      value: the modified score.
      with_slope: the same and its derivative by the score.
    """

    arrays: tuple[str, ...]
    value: Function
    with_slope: Function

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Modification:
        given = json.loads(text)
        return cls(tuple(given["arrays"]), _function(given["value"]), _function(given["with_slope"]))


def _function(given: dict[str, Any]) -> Function:
    def scalars(found: Sequence[dict[str, Any]]) -> tuple[Scalar, ...]:
        return tuple(Scalar(**one) for one in found)

    def step(one: dict[str, Any]) -> Step:
        parameter = one["parameter"]
        if isinstance(parameter, dict):
            parameter = Element(**{**parameter, "steps": tuple(parameter["steps"])})
        return Step(Scalar(**one["scalar"]), one["does"], scalars(one["given"]), parameter)

    return Function(tuple(map(step, given["steps"])), scalars(given["results"]))


# -- making one --------------------------------------------------------------------------------------------------------


class Builder:
    """Makes a function of scalars, in float32 or (`wide`) float64."""

    def __init__(self, wide: str):
        self.wide = wide
        self._steps: list[Step] = []

    def field(self, name: str) -> Scalar:
        """One of FIELDS."""
        return Scalar("real" if name == "score" else "whole", name)

    def function(self, *results: Scalar) -> Function:
        return Function(tuple(self._steps), results)

    def kind(self, dtype: Any) -> str:
        """Of what is computed in a dtype. Raises Unspeakable."""
        name = str(dtype)
        if name == self.wide:
            return "real"
        if name in NARROW or name == "int32" or (name == "int64" and self.wide == "float64"):
            return "whole"
        if name == "bool":
            return "condition"
        raise Unspeakable(f"computes in {name}")

    def number(self, kind: str, value: Any) -> Scalar:
        made: dict[str, Callable[[Any], Any]] = {"condition": bool, "whole": int, "real": float}
        return Scalar(kind, made[kind](value))

    def element(self, kind: str, element: Element, indices: Sequence[Scalar]) -> Scalar:
        """Of a condition: whether it is not 0. Indices lie inside."""
        return self._step(kind, "", *indices, parameter=element)

    def within(self, index: Scalar, last: int) -> Scalar:
        """The index, or the nearest from 0 to `last`."""
        return self._step("whole", "clamp_whole", self.number("whole", 0), index, self.number("whole", last))

    def wrapped(self, x: Scalar, dtype: Any) -> Scalar:
        """Numbers of the dtype come around where those that they are computed in do not yet."""
        name = str(dtype)
        narrow = name in NARROW or (name == "int32" and self.wide == "float64")
        return self._step(x.kind, "wrapped", x, parameter=name) if narrow else x

    def converted(self, x: Scalar, dtype: Any) -> Scalar:
        """As a number of another dtype."""
        kind = self.kind(dtype)
        if x.kind == "real" and kind == "whole":
            return self._step(kind, "to_whole", x, parameter=str(dtype))
        return self.wrapped(self._as(x, kind), dtype)

    def chosen(self, condition: Scalar, a: Scalar, b: Scalar) -> Scalar:
        """a where the condition holds, else b."""
        return self._step(a.kind, f"choose_{a.kind}", condition, a, b)

    def compute(self, name: str, given: Sequence[Scalar], dtype: Any, **parameters: Any) -> Scalar:
        """The result, of a dtype, of what JAX calls `name`, with JAX's parameters. Raises Unspeakable."""
        return self.wrapped(self._computed(name, list(given), dtype, parameters), dtype)

    def _step(
        self, kind: str, does: str, *given: Scalar, parameter: int | str | Element | None = None
    ) -> Scalar:  # fmt: skip
        scalar = Scalar(kind, f"x{len(self._steps)}")
        self._steps.append(Step(scalar, does, given, parameter))
        return scalar

    def _computed(self, name: str, given: list[Scalar], dtype: Any, parameters: dict[str, Any]) -> Scalar:
        made = self.kind(dtype)
        kind = given[0].kind if given else made
        step = partial(self._step, made)
        if name in _INFIX and made != "condition":
            sign, function = _INFIX[name]
            return step(function if made == "whole" else sign, *given)
        if name in _SHIFTS:
            return step(_SHIFTS[name], *given, parameter=np.iinfo(str(dtype)).bits)
        if name in _BITS:
            sign, function = _BITS[name]
            return step(function if made == "condition" else sign, *given)
        if name in _COMPARED:
            if kind != "condition":
                return step(_COMPARED[name], *given)
            if name in ("eq", "ne"):
                different = step("different", *given)
                return different if name == "ne" else step("negated", different)
        if name == "select_n" and len(given) == 3 and kind == "condition":
            return self.chosen(given[0], given[2], given[1])
        if name == "not":
            return step("negated" if made == "condition" else "~", *given)
        if name in _NOTHING or (name == "reduce_sum" and not parameters["axes"]):
            return given[0]
        if name == "integer_pow" and parameters["y"] == 0 and made != "condition":
            return self.number(made, 1)
        if name == "square" or (name == "integer_pow" and parameters["y"] > 0):
            return step(f"power_{made}", *given, parameter=parameters.get("y", 2))
        if made == "whole":
            if name == "neg":
                return step("minus", self.number("whole", 0), *given)
            if name == "abs":
                return step("most_whole", *given, step("minus", self.number("whole", 0), *given))
            if name in _OF_WHOLE:
                return step(_OF_WHOLE[name], *given)
        if made == "real":
            return self._real(name, parameters, [self._as(x, "real") for x in given])
        if name == "is_finite":
            return step("<", self._step("real", "absolute", *given), self.number("real", math.inf))
        if name in ("max", "min") and made == "condition":
            return step("either" if name == "max" else "both", *given)
        raise Unspeakable(f"uses {name}")

    def _real(self, name: str, parameters: dict[str, Any], given: list[Scalar]) -> Scalar:
        step, one = partial(self._step, "real"), self.number("real", 1)
        if name == "neg":
            return step("-", *given)
        if name == "div":
            return step("/", *given)
        if name == "rsqrt":
            return step("/", one, step("root", *given))
        if name == "integer_pow":
            return step("/", one, step("power_real", *given, parameter=-parameters["y"]))
        if name in _FUNCTIONS:
            return step(_FUNCTIONS[name], *given)
        if name == "round":
            return step("rint" if int(parameters["rounding_method"]) else "round", *given)
        if name in _NAMED:
            return step(name, *given)
        raise Unspeakable(f"uses {name}")

    def _as(self, x: Scalar, kind: str) -> Scalar:
        if x.kind == kind:
            return x
        if x.kind == "condition":
            return self.chosen(x, self.number(kind, 1), self.number(kind, 0))
        if kind == "condition":
            return self._step(kind, "!=", x, self.number(x.kind, 0))
        return self._step(kind, "to_real", x)


_INFIX = {"add": ("+", "plus"), "add_any": ("+", "plus"), "sub": ("-", "minus"), "mul": ("*", "times")}
_SHIFTS = {"shift_left": "shift_left", "shift_right_arithmetic": "shift_right"}
_BITS = {"and": ("&", "both"), "or": ("|", "either"), "xor": ("^", "different")}
_COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_NOTHING = ("copy", "copy_p", "pvary", "pcast")

#: Of real numbers.
_FUNCTIONS = {
    "abs": "absolute", "sign": "sign_real", "exp": "exp_real", "exp2": "exp2_real", "log": "log_real",
    "tanh": "tanh_real", "logistic": "logistic", "sqrt": "root", "max": "most_real", "min": "least_real",
    "clamp": "clamp_real", "pow": "pow", "atan2": "atan2", "rem": "fmod",
}  # fmt: skip
_OF_WHOLE = {
    "sign": "sign_whole", "max": "most_whole", "min": "least_whole", "clamp": "clamp_whole", "div": "quotient",
    "rem": "remainder",
}  # fmt: skip

#: Of a real number: functions whose name is what C calls them.
_NAMED = (
    *("log1p", "expm1", "cbrt", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh"),
    *("erf", "erfc", "floor", "ceil"),
)

#: All functions that a language has a word for, beside operators.
WORDS = (
    *_NAMED, *_FUNCTIONS.values(), *_OF_WHOLE.values(), *_SHIFTS.values(), "round", "rint", "to_real", "to_whole",
    "wrapped", "power_real", "power_whole", "choose_real", "choose_whole", "choose_condition", "negated", "both",
    "either", "different", "plus", "minus", "times",
)  # fmt: skip


# -- spelling it -------------------------------------------------------------------------------------------------------


class Language(abc.ABC):
    """How a program is spelled.

    Attributes:
      fields: what FIELDS are called, where not by their own names.
    """

    fields: dict[str, str] = {}  # noqa: RUF012

    def spell(self, function: Function) -> tuple[list[str], list[str]]:
        """(its lines, its results)."""
        return [self.line(str(one.scalar.value), self._expression(one)) for one in function.steps], [
            self.text(x) for x in function.results
        ]

    def _expression(self, one: Step) -> str:
        if isinstance(one.parameter, Element):
            return self.element(one.scalar.kind, one.parameter, one.given)
        if one.does.isidentifier():
            return self.call(one.does, one.given, one.parameter)
        return self.operator(one.does, *one.given)

    def text(self, x: Scalar) -> str:
        """An operand."""
        return self.fields.get(x.value, x.value) if isinstance(x.value, str) else self.number(x.kind, x.value)

    @abc.abstractmethod
    def line(self, name: str, expression: str) -> str:
        """A line that gives an expression a name."""

    @abc.abstractmethod
    def number(self, kind: str, value: float) -> str:
        """A number of that kind; infinite, or none, too."""

    @abc.abstractmethod
    def operator(self, sign: str, a: Scalar, b: Scalar | None = None) -> str:
        """An operator before an operand or between two: of real numbers, a comparison, or of bits of integers."""

    @abc.abstractmethod
    def call(self, function: str, given: Sequence[Scalar], parameter: int | str | None) -> str:
        """The result of one of WORDS."""

    @abc.abstractmethod
    def element(self, kind: str, element: Element, indices: Sequence[Scalar]) -> str:
        """An element of an array; of conditions: whether it is not 0."""


__all__ = ["FIELDS", "NARROW", "WORDS", "Builder", "Element", "Function", "Language", "Modification", "Scalar", "Step",
           "Unspeakable"]  # fmt: skip
