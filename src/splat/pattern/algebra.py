"""Set algebra on runs, and the expression nodes `& | - ~ .T` that use it.

The algebra is closed: the intersection of two runs is a run (interval clipping where one stride is 1, the Chinese
remainder theorem for two strides); a union is a concatenation made disjoint by subtracting; a difference splits a run
in the parts left and right of the other. Everything is written in closed form over lines, so that the same code
evaluates NumPy arrays and traced JAX arrays. Where numbers are known, runs that are empty in every line are dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from splat.errors import IrregularPatternError
from splat.pattern.core import _OPERATIONS, MAX_LENGTH, Array, Axis, Pattern, Run, array_namespace, lcm

#: More components than this are refused: the metadata and the code would no longer be small.
MAX_COMPONENTS = 256


# -- runs ------------------------------------------------------------------------------------------------------------


def without_empty(runs: Sequence[Run]) -> list[Run]:
    """Without the runs that are empty in every line (only where the numbers are known)."""
    return [run for run in runs if not run.is_static or _some(run.count)]


def prune(runs: Sequence[Run]) -> list[Run]:
    """`without_empty`, and refused where too many remain."""
    kept = without_empty(runs)
    if len(kept) > MAX_COMPONENTS:
        raise IrregularPatternError(
            f"this pattern needs {len(kept)} affine components, more than {MAX_COMPONENTS}. Simplify the expression, "
            "or use dense masked attention for it.",
            runs=len(kept),
        )
    return kept


def _some(count: Array) -> bool:
    """Whether any line has an element; a few lines usually tell."""
    return bool((count[:: max(count.size // 64, 1)] > 0).any()) or bool((count > 0).any())


def _where(xp, keep: Array, count: Array) -> Array:
    return xp.where(keep, count, 0)


def _meet(a: Run, b: Run) -> tuple[Array, Array, Array]:
    """Two strides above 1, line by line: (whether they have a common residue, a's residue, steps of a's stride from
    there to the least common one)."""
    common = math.gcd(a.stride, b.stride)
    step = b.stride // common
    inverse = pow(a.stride // common, -1, step) if step > 1 else 0
    xp = array_namespace(a.start, b.start)
    residue = a.start % a.stride
    gap = b.start % b.stride - residue
    exists = gap % common == 0
    # step < 2**31 and gap // common < step, but their product may not fit: reduce through 64 bits where NumPy has them.
    factor = (gap // common) % step
    if xp is np:
        steps = (factor.astype(np.int64) * inverse) % step
    else:
        steps = _mulmod(xp, factor, inverse, step)
    return exists, residue, steps


def _mulmod(xp, x: Array, factor: int, modulus: int) -> Array:
    """`x * factor % modulus` in 32 bits by doubling; `modulus` is static and below 2**30."""
    result = xp.zeros_like(x)
    while factor:
        if factor & 1:
            result = (result + x) % modulus
        x = (x + x) % modulus
        factor >>= 1
    return result


def intersect(a: Run, b: Run) -> Run:
    """The run of the elements in both, line by line."""
    if a.stride == 1:
        a, b = b, a
    if b.stride == 1:
        clipped = a.clip(b.start, b.stop)
        # The smaller step: where one bound is constant over lines the other alone says which lines are alike.
        step = a.line_step if a.stride > 1 else lcm(a.line_step, b.line_step)
        return dataclasses.replace(clipped, line_step=step)
    xp = array_namespace(a.start, b.start, a.count, b.count)
    exists, residue, steps = _meet(a, b)
    stride = math.lcm(a.stride, b.stride)
    exists = exists & (a.count > 0) & (b.count > 0)
    lo = xp.maximum(a.start, b.start)
    last = xp.minimum(a.stop - a.stride, b.stop - b.stride)
    if stride > MAX_LENGTH:  # then no line has more than one element, and any stride describes it
        start, exists = _only_element(a.stride, residue, steps, stride // a.stride - steps, exists, lo)
        stride, count = 1, xp.where(start <= last, 1, 0)
    else:
        first = residue + a.stride * steps
        start = first + -((first - lo) // stride) * stride
        count = xp.maximum((last - start) // stride + 1, 0)
    count = _where(xp, exists & (start <= last), count)
    if xp is np:
        start, count = start.astype(np.int32), count.astype(np.int32)
    return Run(stride, start, count, 1 if stride == 1 else lcm(a.line_step, b.line_step))


def _only_element(
    stride: int, residue: Array, above: Array, below: Array, exists: Array, lo: Array
) -> tuple[Array, Array]:
    """(the element at or after `lo`, whether there is one): `above` steps after the residue, or `below` before it.

    Steps that leave the positions would leave 32 bits, too.
    """
    xp = array_namespace(residue, above, lo)
    reach = MAX_LENGTH // stride
    after, before = residue + stride * xp.minimum(above, reach), residue - stride * xp.minimum(below, reach + 1)
    is_before = (below <= reach + 1) & (before >= lo)
    start = xp.where(is_before, before, after)
    exists = exists & (is_before | (above <= reach)) & (start >= lo)
    return _where(xp, exists, start), exists


def subtract(a: Run, b: Run) -> list[Run]:
    """Disjoint runs of the elements of `a` that are not in `b`."""
    xp = array_namespace(a.start, a.count, b.start, b.count)
    if b.stride > 1 and a.stride % b.stride:
        return _subtract_lattice(a, b)
    # All elements of `a` are equal modulo b.stride: in a line, b takes an interval of them or nothing.
    lo, hi = b.start, b.stop
    hit = b.count > 0
    if b.stride > 1:
        hit = hit & ((a.start - b.start) % b.stride == 0)
    left, right = a.before(lo), a.since(hi)
    return [
        Run(a.stride, a.start, xp.where(hit, left.count, a.count), a.line_step),
        Run(a.stride, right.start, _where(xp, hit, right.count), a.line_step),
    ]


def _subtract_lattice(a: Run, b: Run) -> list[Run]:
    """`a` minus a coarser or incommensurable lattice.

    Where they meet in few columns of a line, `a` is cut there. Else a's lattice falls in classes, and `b` lies in the
    first alone.
    """
    stride = math.lcm(a.stride, b.stride)
    needed = parts = stride // a.stride
    if a.is_static and b.is_static:
        shared = intersect(a, b)
        needed = min(parts, int(shared.count.max(initial=0)) + 1)
        if needed <= MAX_COMPONENTS and (needed < parts or stride > MAX_LENGTH):
            return _cut(a, shared, needed - 1)
    if needed > MAX_COMPONENTS or stride > MAX_LENGTH:
        raise IrregularPatternError(
            f"a difference of runs with strides {a.stride} and {b.stride} needs {needed} affine components, more than "
            f"{MAX_COMPONENTS}. Choose strides that divide each other, or use dense masked attention.",
            runs=needed,
        )
    exists, residue, steps = _meet(a, b)
    xp = array_namespace(a.start, a.count, residue, exists)
    first = residue + a.stride * xp.where(exists, steps, 0)
    step = b.line_step if a.stride == 1 else lcm(a.line_step, b.line_step)
    out: list[Run] = []
    for k in range(parts):
        residue = (first + k * a.stride) % stride
        start = (a.start + (residue - a.start) % stride).astype(np.int32)
        count = xp.maximum(-((start - a.stop) // stride), 0).astype(np.int32)
        part = Run(stride, start, _where(xp, a.count > 0, count), step)
        out += subtract(part, b) if k == 0 else [part]
    return out


def _cut(a: Run, holes: Run, most: int) -> list[Run]:
    """`a` without the elements of `holes`, which are some of its own, `most` in a line: the runs between them."""
    out, rest = [], a
    for n in range(most):
        at, here = holes.start + n * holes.stride, n < holes.count
        left, right = rest.before(at), rest.since(at + 1)
        out.append(Run(a.stride, rest.start, np.where(here, left.count, rest.count), a.line_step))
        rest = Run(a.stride, right.start, _where(np, here, right.count), a.line_step)
    return [*out, rest]


def difference(minuend: Sequence[Run], subtrahend: Sequence[Run]) -> list[Run]:
    """Every run of `minuend` without any element of `subtrahend`."""
    left = list(minuend)
    for b in subtrahend:
        left = prune([part for a in left for part in subtract(a, b)])
    return left


def intersection(left: Sequence[Run], right: Sequence[Run]) -> list[Run]:
    """Pairwise intersections: disjoint, because both sides are."""
    return prune([intersect(a, b) for a in left for b in right])


def union(left: Sequence[Run], right: Sequence[Run]) -> list[Run]:
    """A disjoint union: the denser side is kept whole, the other loses what they share; or the other way round.

    The other way where the first is refused, or falls into pieces of which there are fewer then.
    """
    a, b = list(left), list(right)
    if max((r.stride for r in a), default=1) > max((r.stride for r in b), default=1):
        a, b = b, a

    def joined(whole: list[Run], other: list[Run]) -> list[Run]:
        return prune(coalesce(whole + difference(other, whole)))

    try:
        made = joined(a, b)
    except IrregularPatternError:
        return joined(b, a)
    if len(made) > len(a) + len(b) + 1 and all(run.is_static for run in made):
        with contextlib.suppress(IrregularPatternError):
            return min(made, joined(b, a), key=len)
    return made


def coalesce(runs: Sequence[Run]) -> list[Run]:
    """Merge components of one stride where, in every line, the second continues the first (or one is empty)."""
    merged: list[Run] = []
    for run in runs:
        for n, other in enumerate(merged):
            joined = _continue(other, run) or _continue(run, other)
            if joined is not None:
                merged[n] = joined
                break
        else:
            merged.append(run)
    return merged


def _continue(a: Run, b: Run) -> Run | None:
    if a.stride != b.stride or a.line_step != b.line_step or not (a.is_static and b.is_static):
        return None
    if not a.count.size or not _fits(a, b, slice(0, 1)) or not _fits(a, b, slice(None)):
        return None
    if a.stride > 1 and ((a.start - b.start) % a.stride).any():  # else line_step would no longer tell the residue
        return None
    # A few long rows stay apart: joined, they would stretch the row tiles they share with ordinary rows.
    sizes = np.count_nonzero(a.count > 0), np.count_nonzero(b.count > 0)
    few, many = (a, b) if sizes[0] < sizes[1] else (b, a)
    if 4 * min(sizes) <= max(sizes) and int(few.count.max()) > 2 * int(many.count.max()):
        return None
    start = np.where(a.count > 0, a.start, b.start)
    count = np.maximum(a.count, 0) + np.maximum(b.count, 0)
    return Run(a.stride, start, count, a.line_step)


def _fits(a: Run, b: Run, lines: slice) -> bool:
    """Whether `b` starts where `a` stops, in every line in which both are; first tried on one line, which is quick."""
    a_count, b_count = a.count[lines], b.count[lines]
    stop = a.start[lines] + a_count * a.stride
    return bool(np.all((stop == b.start[lines]) | (a_count <= 0) | (b_count <= 0)))


# -- nodes -----------------------------------------------------------------------------------------------------------


def _parenthesise(pattern: Pattern, minimum: int) -> str:
    text = repr(pattern)
    return text if pattern.precedence >= minimum else f"({text})"


@dataclasses.dataclass(frozen=True, repr=False)
class _Binary(Pattern):
    left: Pattern
    right: Pattern

    symbol = "?"
    combine = staticmethod(intersection)

    @property
    def children(self) -> tuple[Pattern, ...]:
        return (self.left, self.right)

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        return type(self).combine(self.left.runs(rows, cols), self.right.runs(rows, cols))

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        return type(self).combine(self.left.column_runs(cols, rows), self.right.column_runs(cols, rows))

    def __repr__(self) -> str:
        left = _parenthesise(self.left, self.precedence)
        return f"{left} {self.symbol} {_parenthesise(self.right, self.precedence + 1)}"


@dataclasses.dataclass(frozen=True, repr=False)
class Intersection(_Binary):
    symbol, precedence = "&", 2


@dataclasses.dataclass(frozen=True, repr=False)
class Union(_Binary):
    symbol, precedence, combine = "|", 1, staticmethod(union)


@dataclasses.dataclass(frozen=True, repr=False)
class Difference(_Binary):
    symbol, precedence, combine = "-", 3, staticmethod(difference)


def everything(lines: Axis, cross: Axis) -> Run:
    """The run that holds all of `cross` in every line."""
    xp = array_namespace(lines.start, cross.start)
    zero = xp.zeros(lines.length, dtype=np.int32)
    return Run(1, zero + cross.start, zero + np.int32(cross.length))


@dataclasses.dataclass(frozen=True, repr=False)
class Complement(Pattern):
    inner: Pattern

    precedence = 4

    @property
    def children(self) -> tuple[Pattern, ...]:
        return (self.inner,)

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        return difference([everything(rows, cols)], self.inner.runs(rows, cols))

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        return difference([everything(cols, rows)], self.inner.column_runs(cols, rows))

    def __repr__(self) -> str:
        return f"~{_parenthesise(self.inner, self.precedence)}"


@dataclasses.dataclass(frozen=True, repr=False)
class Transpose(Pattern):
    inner: Pattern

    @property
    def children(self) -> tuple[Pattern, ...]:
        return (self.inner,)

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        return self.inner.column_runs(rows, cols)

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        return self.inner.runs(cols, rows)

    def __repr__(self) -> str:
        return f"{_parenthesise(self.inner, 5)}.T"


def _transpose(pattern: Pattern) -> Pattern:
    return pattern.inner if isinstance(pattern, Transpose) else Transpose(pattern)


def _complement(pattern: Pattern) -> Pattern:
    return pattern.inner if isinstance(pattern, Complement) else Complement(pattern)


_OPERATIONS.update(
    intersection=Intersection, union=Union, difference=Difference, complement=_complement, transpose=_transpose
)
