"""Score modification in C++: its program as functions of vectors, the score and the score with its derivative.

Whether a value is one number or a vector is left to the types: the same text serves kernels that have queries in the
lanes and those that have keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from splat.codegen.scalars import NARROW, Element, Language, Modification, Scalar

#: Of elements of arrays: dtype -> its type in C++.
ELEMENTS = {
    "float32": "float", "float64": "double", "bfloat16": "bfloat16", "float16": "float16", "bool": "uint8_t",
    "int32": "int32_t", "int64": "int64_t", **{name: f"{name}_t" for name in NARROW},
}  # fmt: skip


def text(modification: Modification) -> Iterator[str]:
    """The lines of `struct ScoreMod`."""
    yield "// What becomes of a score, and its derivative by the score."
    yield "struct ScoreMod {"
    yield f"  static constexpr int num_arrays = {len(modification.arrays)};"
    for name in ("value", "with_slope"):
        yield (
            "  template <class T, class Score, class At> static SPLAT_INLINE auto "
            + f"{name}(Score score, const At& at) {{"
        )
        yield "    using I = Int<T>;"
        lines, results = _Cpp().spell(getattr(modification, name))
        yield from (f"    {line}" for line in lines)
        yield f"    return {results[0]};" if len(results) == 1 else f"    return mod::pair({', '.join(results)});"
        yield "  }"
    yield "};"


class _Cpp(Language):
    fields = {name: f"at.{name}" for name in ("batch", "head", "row", "column", "offset")}  # noqa: RUF012

    def line(self, name: str, expression: str) -> str:
        return f"const auto {name} = {expression};"

    def number(self, kind: str, value: float) -> str:
        if kind == "condition":
            return str(bool(value)).lower()
        if kind == "whole":
            return f"((I){value})"
        if math.isnan(value):
            return '(T)__builtin_nan("")'
        if math.isinf(value):
            return "kInfinity<T>" if value > 0 else "(-kInfinity<T>)"
        return f"((T){value!r})"

    def operator(self, sign: str, a: Scalar, b: Scalar | None = None) -> str:
        return f"{sign}{self.text(a)}" if b is None else f"{self.text(a)} {sign} {self.text(b)}"

    def call(self, function: str, given: Sequence[Scalar], parameter: int | str | None) -> str:
        listed = ", ".join(map(self.text, given))
        if function in _EACH:
            names = ("a", "b")[: len(given)]
            arguments = ", ".join(f"T {name}" for name in names)
            run = f"__builtin_{function}({', '.join(names)})"
            return f"mod::each<T>({listed}, []({arguments}) {{ return {run}; }})"
        if parameter is None:
            return f"mod::{function}<T>({listed})"
        return f"mod::{function}<T, {ELEMENTS.get(str(parameter), parameter)}>({listed})"

    def element(self, kind: str, element: Element, indices: Sequence[Scalar]) -> str:
        places = zip(indices, element.steps, strict=True)
        along = "".join(f", mod::along({self.text(index)}, {step})" for index, step in places)
        of = "T" if kind == "real" else "I"
        read = f"mod::element<{of}>((const {ELEMENTS[element.dtype]}*)at.arrays[{element.array}]{along})"
        return f"{read} != 0" if kind == "condition" else read


#: One lane after the other: the compiler's own functions.
_EACH = (
    *("log1p", "expm1", "cbrt", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh"),
    *("erf", "erfc", "floor", "ceil", "round", "rint", "pow", "atan2", "fmod"),
)

__all__ = ["ELEMENTS", "text"]
