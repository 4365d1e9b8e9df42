"""The `Pattern` base class, and the two values every pattern is evaluated on and to: `Axis` and `Run`."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import cache, cached_property
from typing import Any, NoReturn

import numpy as np

from splat.errors import ArgumentError, PatternError

Array = Any  # a NumPy array, or a (traced) JAX array: whatever follows the array API

#: Operations one inside the other, at most: what goes through an expression calls itself.
MAX_DEPTH = 128

#: Positions are int32; half of its range leaves room for `i - left` and the like.
MAX_LENGTH = 2**30


def array_namespace(*values: Array) -> Any:
    """`numpy`, or the array namespace (`jax.numpy`) of the first run-time array among `values`."""
    for value in values:
        if is_runtime_array(value):
            return value.__array_namespace__()
    return np


def is_runtime_array(value: Any) -> bool:
    """Whether `value` is an array whose contents are known only at run time (any array but NumPy's)."""
    return hasattr(value, "__array_namespace__") and not isinstance(value, (np.ndarray, np.generic))


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """Absolute positions `start + [0, length)` along queries or along keys.

    `start` is an int, or a traced scalar (a run-time `query_offset`); `length` is always static.
    """

    start: Any
    length: int

    @property
    def stop(self) -> Any:
        return self.start + self.length

    @property
    def is_static(self) -> bool:
        return not is_runtime_array(self.start)

    @cached_property
    def positions(self) -> Array:
        """int32 [length], absolute."""
        xp = array_namespace(self.start)
        if xp is np:
            return np.arange(self.start, self.start + self.length, dtype=np.int32)
        return xp.arange(self.length, dtype=np.int32) + self.start.astype(np.int32)

    def inside(self, known: int) -> tuple[Any, Array | None]:
        """(index of the positions in `known` numbers, for which of them it is right; None: for all)."""
        if self.is_static and self.start >= 0 and self.stop <= known:
            return slice(self.start, self.stop), None
        at = array_namespace(self.start).clip(self.positions, 0, known - 1)
        return at, at == self.positions


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One arithmetic progression per line: line i holds `start[i] + stride*t` for `0 <= t < count[i]`.

    Attributes:
      stride: static, the same for every line.
      start, count: int32 [lines]; `count <= 0` where the line has no run.
      line_step: how lines must be grouped so that all of a group share the residue `start mod stride`: lines whose
        positions are equal modulo `line_step` do. 1: all lines do. None: nothing is known, look at the numbers.
        For `stride == 1` any grouping is legal, and `line_step` is the one under which equal lines meet.
    """

    stride: int
    start: Array
    count: Array
    line_step: int | None = 1

    @property
    def stop(self) -> Array:
        """One past the last element's lattice step: `start + stride*count`."""
        return self.start + self.count * self.stride if self.stride > 1 else self.start + self.count

    @property
    def is_static(self) -> bool:
        return not (is_runtime_array(self.start) or is_runtime_array(self.count))

    def before(self, hi: Array) -> Run:
        """The elements below `hi`, a scalar or one per line."""
        xp = array_namespace(self.start, self.count, hi)
        kept = hi - self.start if self.stride == 1 else -((self.start - hi) // self.stride)
        return Run(self.stride, self.start, xp.maximum(xp.minimum(self.count, kept), 0), self.line_step)

    def since(self, lo: Array) -> Run:
        """The elements at or above `lo`, a scalar or one per line."""
        xp = array_namespace(self.start, self.count, lo)
        if self.stride == 1:
            start = xp.maximum(self.start, lo)
            return Run(1, start, xp.maximum(self.stop - start, 0), self.line_step)
        skipped = xp.maximum(-((self.start - lo) // self.stride), 0)
        count = xp.maximum(self.count - skipped, 0)
        return Run(self.stride, self.start + skipped * self.stride, count, self.line_step)

    def clip(self, lo: Array, hi: Array) -> Run:
        """The elements in `[lo, hi)`; the bounds are scalars or one per line."""
        return self.since(lo).before(hi)


#: Whether `repr` of a long array is its size alone.
_BRIEF: ContextVar[bool] = ContextVar("brief", default=False)


def brief(pattern: Pattern) -> str:
    """The pattern's expression for people: long arrays are given by their size, and `parse` cannot read it back."""
    token = _BRIEF.set(True)
    try:
        return repr(pattern)
    finally:
        _BRIEF.reset(token)


class Frozen:
    """A hashable, read-only array inside a pattern; run-time arrays are kept as they are and compare by identity."""

    def __init__(self, values: Any, dtype: Any = np.int32):
        if is_runtime_array(values):
            self.array: Any = values
            self._key: Any = id(values)
            return
        array = np.array(values, dtype=dtype)
        array.flags.writeable = False
        self.array = array
        self._key = (array.shape, array.dtype.str, hashlib.blake2b(array.tobytes(), digest_size=16).digest())

    @property
    def is_static(self) -> bool:
        return isinstance(self.array, np.ndarray)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frozen) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        if self.is_static and self.array.size > 64 and _BRIEF.get():
            return f"<{self.array.size} numbers>"
        if not self.is_static:
            return f"<run-time array {self.array.dtype}{list(self.array.shape)}>"
        return encode_array(self.array)


def encode_array(array: np.ndarray) -> str:
    """Text for an array inside an expression: a list while short, else a compressed string."""
    if array.size <= 64 and all(array.shape):
        return repr(array.tolist())
    import base64
    import zlib

    data = np.ascontiguousarray(np.diff(array.astype(np.int64), axis=-1, prepend=0))
    level = (
        6 if array.size <= 1 << 16 else 1
    )  # printing a plan over a million rows should not take longer than making it
    payload = base64.b85encode(zlib.compress(data.astype("<i8").tobytes(), level)).decode()
    shape = "x".join(str(n) for n in array.shape)
    return f'"{shape}:{payload}"'


def decode_array(text: str) -> np.ndarray:
    """The array that `encode_array` wrote as a string."""
    import base64
    import zlib

    try:
        shape, payload = text.split(":", 1)
        sizes = tuple(int(n) for n in shape.split("x"))
        packed, wanted = base64.b85decode(payload), 8 * math.prod(sizes)
        if not 0 <= wanted <= 1100 * (len(packed) + 64):  # zlib packs at most about 1030 times
            raise ValueError
        unpacked = zlib.decompressobj().decompress(packed, wanted + 1)
        data = np.frombuffer(unpacked, "<i8").reshape(sizes)
    except (ValueError, zlib.error):
        raise PatternError(
            f"the text {text[:40]!r} is not an array as repr() of a pattern writes it. Texts stand for arrays: write "
            "[0, 1, 2] for an array, and a pattern without quotes."
        ) from None
    return np.cumsum(data, axis=-1).astype(np.int32)


@dataclasses.dataclass(frozen=True, repr=False)
class Pattern:
    """A set of (query, key) pairs, symbolic: an expression, not an array.

    Combine patterns with `&` (both), `|` (either), `-` (first without second) and `~` (all others); `p.T` swaps
    queries and keys. Patterns are frozen and hashable; `repr(p)` is an expression that `splat.parse` reads back.
    Row i and column j are absolute positions.

    >>> import splat
    >>> splat.causal() & splat.window(512) | splat.sink(4)
    causal() & window(512) | sink(4)
    """

    # -- what a pattern must tell: its runs, line by line, in both directions ------------------------------------

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        """Disjoint runs of columns (absolute, inside `cols`) for every position of `rows`."""
        raise NotImplementedError

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        """The transposed view: disjoint runs of rows (inside `rows`) for every position of `cols`."""
        raise NotImplementedError

    @property
    def children(self) -> tuple[Pattern, ...]:
        return ()

    @property
    def depth(self) -> int:
        """How many operations are one inside the other."""
        known = self.__dict__.get("_depth")  # no cached_property: torch.compile cannot look through its lock
        if known is None:
            known = self.__dict__["_depth"] = max([1 + child.depth for child in self.children], default=0)
        return known

    @cached_property
    def is_static(self) -> bool:
        """Whether everything is known now: no traced or device array inside."""
        return not self.run_time_arrays

    @cached_property
    def run_time_arrays(self) -> tuple[Array, ...]:
        """The traced and device arrays inside, each once."""
        return tuple(array for array in self._arrays() if is_runtime_array(array))

    @cached_property
    def nbytes(self) -> int:
        """About how much memory it holds in the end: the arrays inside, and as much that is seen from their columns."""
        return 2 * sum(array.nbytes for array in self._arrays())

    def _arrays(self) -> list[Array]:
        own = (getattr(one, field.name) for one in walk(self) for field in dataclasses.fields(one))
        return list({id(x.array): x.array for x in own if isinstance(x, Frozen)}.values())

    # -- looking -------------------------------------------------------------------------------------------------

    def to_dense(self, q_len: int, kv_len: int | None = None, *, query_offset: int = 0) -> np.ndarray:
        """The mask, bool [q_len, kv_len], True = attend. For looking and testing: it is O(q_len x kv_len)."""
        rows, cols = check_axes("to_dense", q_len, q_len if kv_len is None else kv_len, query_offset)
        mask = np.zeros((rows.length, cols.length), bool)
        line = np.arange(rows.length)
        for run in self.runs(rows, cols):
            start, count = np.asarray(run.start), np.asarray(run.count)
            for t in range(int(count.max(initial=0))):
                here = t < count
                mask[line[here], start[here] + run.stride * t] = True
        return mask

    # -- set algebra (the operators only build the expression; `algebra` evaluates it) ---------------------------

    def __and__(self, other: Pattern) -> Pattern:
        return _combine("intersection", self, other)

    def __or__(self, other: Pattern) -> Pattern:
        return _combine("union", self, other)

    def __sub__(self, other: Pattern) -> Pattern:
        return _combine("difference", self, other)

    def __invert__(self) -> Pattern:
        return _operation("complement", self)

    @property
    def T(self) -> Pattern:
        """The same pairs with queries and keys swapped."""
        return _operation("transpose", self)

    def __bool__(self) -> NoReturn:
        """Refused: `p and q` would be q alone, `p or q` p alone, and `not p` False."""
        raise TypeError(
            "a pattern is neither true nor false, so that `and`, `or` and `not` cannot combine patterns. Use & (both), "
            "| (either), - (first without second) and ~ (all others); ask whether there is one with `is None`."
        )

    # -- text ----------------------------------------------------------------------------------------------------

    #: How tightly the outermost operator binds (Python's order: `|` 1, `&` 2, `-` 3, `~` 4, calls 5).
    precedence = 5

    def __repr__(self) -> str:
        raise NotImplementedError


#: name -> constructor of the operations' nodes; `algebra` fills it, so that this file need not import it.
_OPERATIONS: dict[str, Callable[..., Pattern]] = {}


def _combine(operation: str, left: Pattern, right: object) -> Any:
    if not isinstance(right, Pattern):
        return NotImplemented
    lift = getattr(right, "lift", None)  # per_head on the right: combine head by head
    if lift is not None:
        return lift(operation, left)
    return _operation(operation, left, right)


def _operation(name: str, *patterns: Pattern) -> Pattern:
    """An operation's node, if it is not too deep."""
    pattern = _OPERATIONS[name](*patterns)
    if pattern.depth > MAX_DEPTH:
        raise PatternError(
            f"this pattern is an expression of more than {MAX_DEPTH} operations one inside the other. Combine patterns "
            "in pairs, and those in pairs again; documents are segments(...), rows from data from_runs(...)."
        )
    return pattern


def walk(pattern: Pattern) -> Iterator[Pattern]:
    """`pattern` and everything inside it."""
    yield pattern
    for child in pattern.children:
        yield from walk(child)


class _Hole:
    """Stands where a pattern has a run-time array."""

    dtype, shape = "?", ()

    def __array_namespace__(self) -> NoReturn:
        raise TypeError("there is no array yet: see with_arrays")


_hole = cache(lambda number: _Hole())


def without_arrays(pattern: Pattern) -> Pattern:
    """The pattern with a hole for each of its `run_time_arrays`; `with_arrays` fills them. Equal whatever was there."""
    return with_arrays(pattern, [_hole(n) for n in range(len(pattern.run_time_arrays))])


def with_arrays(pattern: Pattern, arrays: Iterable[Array]) -> Pattern:
    """The pattern with other arrays in the places of its `run_time_arrays`."""
    new = {id(old): Frozen(array) for old, array in zip(pattern.run_time_arrays, arrays, strict=True)}

    def changed(value: Any) -> Any:
        if isinstance(value, Frozen):
            return value if value.is_static else new[id(value.array)]
        if isinstance(value, Pattern):
            fields = dataclasses.fields(value)
            return dataclasses.replace(value, **{field.name: changed(getattr(value, field.name)) for field in fields})
        return tuple(map(changed, value)) if isinstance(value, tuple) else value

    return changed(pattern) if new else pattern


def check_int(
    constructor: str, argument: str, value: Any, minimum: int, maximum: int = MAX_LENGTH, *, remedy: str = ""
) -> int:
    """`value` as an int in `[minimum, maximum]`, or a `PatternError` naming the argument, and what to do instead."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if isinstance(value, bool) or number is None:
        raise PatternError(
            f"{constructor}: {argument} must be an int, but {value!r} of type {type(value).__name__} was given"
        )
    if not minimum <= number <= maximum:
        message = f"{constructor}: {argument} must be in [{minimum}, {maximum}], but {number} was given"
        raise PatternError(f"{message}. {remedy}" if remedy else message)
    return int(number)


def check_is_pattern(pattern: Any) -> Pattern:
    """The pattern, or an `ArgumentError` where it is none."""
    if not isinstance(pattern, Pattern):
        raise ArgumentError(
            f"pattern must be a splat pattern such as splat.causal() & splat.window(512), but {type(pattern).__name__} "
            "was given. Use splat.from_mask for a boolean mask, splat.parse for text."
        )
    return pattern


def check_axes(caller: str, q_len: Any, kv_len: Any, query_offset: Any) -> tuple[Axis, Axis]:
    """Query positions `query_offset + [0, q_len)` and key positions `[0, kv_len)`, or a `PatternError`."""
    q_len, kv_len = check_int(caller, "q_len", q_len, 0), check_int(caller, "kv_len", kv_len, 0)
    if not is_runtime_array(query_offset):
        query_offset = check_int(caller, "query_offset", query_offset, -MAX_LENGTH, MAX_LENGTH - q_len)
    return Axis(query_offset, q_len), Axis(0, kv_len)


def check_positions(has: str, known: int, axes: Iterable[Axis], remedy: str) -> None:
    """Raises PatternError where an axis leaves `[0, known)`, the positions that something `has` ("ids name")."""
    for axis in axes:
        if axis.is_static and not 0 <= axis.start <= axis.stop <= known:
            used = f"from position {axis.start}" if axis.start < 0 else f"up to position {axis.stop}"
            raise PatternError(f"{has} {known} positions, but the pattern is used {used}. {remedy}")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def lcm(a: int | None, b: int | None) -> int | None:
    """Least common multiple of two line steps; unknown where either is."""
    return None if a is None or b is None else math.lcm(a, b)
