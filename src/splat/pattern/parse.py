"""Text to pattern: the grammar of `repr`, read without evaluating anything.

    pattern  = pattern ("|" | "&" | "-") pattern | "~" pattern | pattern ".T" | "(" pattern ")" | call
    call     = [ "splat." ] name "(" [ argument { "," argument } ] ")"     name: a constructor of the vocabulary
    argument = [ name "=" ] value
    value    = integer | "True" | "False" | "None" | string | "[" values "]" | "(" values ")" | pattern

Operators bind as in Python: `|` loosest, then `&`, `-`, `~`, `.T`. Integers may be products (`4*128`). Lines may end
anywhere.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable
from typing import Any

from splat.errors import ParseError, PatternError
from splat.pattern import data, grids, heads, library
from splat.pattern.core import Pattern, check_is_pattern, decode_array

CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        library.full,
        library.causal,
        library.window,
        library.sliding_window,
        library.dilated_window,
        library.strided,
        library.lattice_columns,
        library.blocked,
        library.sink,
        library.global_columns,
        library.global_rows,
        library.global_tokens,
        library.segments,
        grids.random_blocks,
        grids.neighborhood,
        data.from_runs,
        heads.per_head,
    )
}

_BINARY = {ast.BitOr: "__or__", ast.BitAnd: "__and__", ast.Sub: "__sub__"}


def parse(text: str) -> Pattern:
    """The pattern that an expression such as `"causal() & window(512) | sink(4)"` describes.

    Raises:
      ParseError: the text is not in the grammar; the message points at the place.
      PatternError: a constructor refused its arguments.
    """
    if not isinstance(text, str):
        raise ParseError(f"parse: text must be a str, but {type(text).__name__} was given")
    text = text.strip()
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        if len(lines := text.splitlines()) > 1 and "#" not in text:  # lines may end anywhere
            return parse(" ".join(lines))
        line, column = (error.text or "").rstrip()[:200], max((error.offset or 1) - 1, 0)
        raise ParseError(f"cannot read this pattern: {error.msg}\n  {line}\n  {' ' * min(column, 200)}^") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ParseError(f"cannot read this pattern: {error}") from None
    try:
        pattern = _Reader(text).pattern(tree.body)
    except RecursionError:
        raise ParseError("cannot read this pattern: it is nested too deeply") from None
    return pattern


def pattern_of(given: Pattern | str) -> Pattern:
    """A pattern, or what a text describes. Raises ArgumentError where it is neither, and what `parse` raises."""
    return parse(given) if isinstance(given, str) else check_is_pattern(given)


class _Reader:
    def __init__(self, text: str):
        self.text = text

    def fail(self, node: ast.expr, message: str, column: int | None = None) -> ParseError:
        column = node.col_offset if column is None else column
        line = self._line(node)
        return ParseError(f"cannot read this pattern: {message}\n  {line[:200]}\n  {' ' * min(column, 200)}^")

    def _line(self, node: ast.expr) -> str:
        return self.text.splitlines()[node.lineno - 1]

    def pattern(self, node: ast.expr) -> Pattern:
        value = self.value(node)
        if not isinstance(value, Pattern):
            raise self.fail(node, f"a pattern was expected here, such as window(256), but {value!r} was found")
        return value

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | None):
                return node.value
            case ast.Constant(value=str(encoded)):
                return decode_array(encoded)
            case ast.List(elts=items):
                return [self.value(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self.value(item) for item in items)
            case ast.UnaryOp(op=ast.USub(), operand=operand) if isinstance(operand, ast.Constant | ast.BinOp):
                return -self._int(operand)
            case ast.BinOp(op=ast.Mult()):
                return self._int(node.left) * self._int(node.right)
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return ~self.pattern(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return getattr(self.pattern(left), _BINARY[type(op)])(self.pattern(right))
            case ast.Attribute(value=inner, attr="T"):
                return self.pattern(inner).T
            case ast.Call():
                return self._call(node)
            case ast.BoolOp(op=op, values=[_, right, *_]):
                word, operator = ("and", "&") if isinstance(op, ast.And) else ("or", "|")
                raise self._word(word, operator, right, self._line(right).rfind(word, 0, right.col_offset))
            case ast.UnaryOp(op=ast.Not()):
                raise self._word("not", "~", node, node.col_offset)
        raise self.fail(node, "only pattern constructors, & | - ~ .T, integers and lists are understood")

    def _word(self, word: str, operator: str, node: ast.expr, column: int) -> ParseError:
        """Of Python's words for truth values; `column` is negative where the word is on a line before the node's."""
        message = f"{word!r} is for truth values, not for patterns; write {operator}"
        return self.fail(node, message, None if column < 0 else column)

    def _int(self, node: ast.expr) -> int:
        value = self.value(node)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(node, f"an integer was expected here, but {value!r} was found")
        return value

    def _call(self, node: ast.Call) -> Any:
        match node.func:
            case ast.Name(id=name) | ast.Attribute(value=ast.Name(id="splat"), attr=name):
                pass
            case _:
                raise self.fail(node, "only named constructors can be called")
        if name not in CONSTRUCTORS:
            close = difflib.get_close_matches(name, CONSTRUCTORS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the vocabulary is: {', '.join(sorted(CONSTRUCTORS))}"
            raise self.fail(node, f"there is no pattern named {name!r}; {hint}")
        constructor = CONSTRUCTORS[name]
        args = [self.value(arg) for arg in node.args]
        kwargs = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.fail(node, "** is not understood")
            if keyword.arg in kwargs:
                raise self.fail(node, f"{name}: {keyword.arg} is given twice")
            kwargs[keyword.arg] = self.value(keyword.value)
        try:
            inspect.signature(constructor).bind(*args, **kwargs)
        except TypeError as error:
            raise self.fail(node, f"{name}{inspect.signature(constructor)}: {error}") from None
        try:
            return constructor(*args, **kwargs)
        except PatternError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise self.fail(node, f"{name} refused its arguments: {error}") from None
