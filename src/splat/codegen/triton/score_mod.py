"""Score modification in Triton: its program as functions of a tile of scores, in the text of the kernels.

Each scalar of the program is a tile, or what broadcasts to one: what depends on the query alone is a column of numbers,
what depends on the key alone a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from splat.codegen.scalars import Element, Language, Modification, Scalar

#: What kernels call them: (score, row, column, place) -> the modified score; and the same with its derivative.
NAMES = {"value": "modify", "with_slope": "modify_with_slope"}

#: Elements of `place` that come before the arrays.
_BEFORE = ("batch", "head", "offset")

#: What arrays must be converted to, where kernels have no pointers to the dtype.
STORED = {"bool": "uint8"}


def text(modification: Modification, which: str) -> Iterator[str]:
    """The lines of one of the functions in `NAMES`."""
    language, function = _Triton(), getattr(modification, which)
    lines, _ = language.spell(function)
    used = {x.value for x in (*(x for step in function.steps for x in step.given), *function.results)}
    yield "@triton.jit"
    yield f"def {NAMES[which]}(score, row, column, place):"
    yield from (f"    {name} = place[{n}]" for n, name in enumerate(_BEFORE) if name in used)
    yield from (f"    {line}" for line in lines)
    yield f"    return {', '.join(f'tl.broadcast_to({language.tile(x)}, score.shape)' for x in function.results)}"
    yield from ("", "")


class _Triton(Language):
    def line(self, name: str, expression: str) -> str:
        return f"{name} = {expression}"

    def number(self, kind: str, value: float) -> str:
        if not math.isfinite(value):
            sign = "-" if value < 0 else ""
            return f'({sign}float("{abs(value)}"))'
        return f"({value})" if value < 0 else str(value)

    def tile(self, x: Scalar) -> str:
        """An operand that has methods: numbers in the text have none."""
        dtype = {"real": "float32", "whole": "int32", "condition": "int1"}[x.kind]
        return f"tl.full([1, 1], {self.text(x)}, tl.{dtype})" if x.known else self.text(x)

    def operator(self, sign: str, a: Scalar, b: Scalar | None = None) -> str:
        if b is None:
            return f"{sign}{self.tile(a)}"
        return f"{self.tile(a) if b.known else self.text(a)} {sign} {self.text(b)}"

    def call(self, function: str, given: Sequence[Scalar], parameter: int | str | None) -> str:
        if function in _OPERATORS:
            return self.operator(_OPERATORS[function], *given)
        texts = list(map(self.tile, given))
        if function in ("choose_real", "choose_whole"):
            return f"tl.where({texts[0]}, {', '.join(map(self.text, given[1:]))})"
        if isinstance(parameter, str):
            return f"{function}_{parameter}({', '.join(texts)})"
        return f"{function}({', '.join([*texts, *([] if parameter is None else [str(parameter)])])})"

    def element(self, kind: str, element: Element, indices: Sequence[Scalar]) -> str:
        at = [f"place[{len(_BEFORE) + element.array}]"]
        for index, step in zip(indices, element.steps, strict=True):
            far = element.size >= 1 << 31 and not index.known
            at.append(f"{self.text(index)}{'.to(tl.int64)' if far else ''} * {step}")
        read = f"tl.load({' + '.join(at)})"
        if kind == "condition":
            return f"{read} != 0"
        wide = {"real": "float32", "whole": "int32"}[kind]
        return read if element.dtype == wide else f"{read}.to(tl.{wide})"


_OPERATORS = {"both": "&", "either": "|", "different": "^"}

__all__ = ["NAMES", "STORED", "text"]
