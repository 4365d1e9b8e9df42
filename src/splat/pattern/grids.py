"""Patterns on blocks and grids: `random_blocks` and `neighborhood`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from splat.errors import PatternError, UnsupportedError
from splat.pattern.algebra import coalesce, prune, without_empty
from splat.pattern.core import Array, Axis, Pattern, Run, array_namespace, ceil_div, check_int, check_positions
from splat.pattern.library import _CONSTRUCTORS, _Primitive

#: (array namespace, coordinate, length, kernel, causal) -> (first, number), inside one dilation group.
Interval = Callable[[Any, Array, Array, int, bool], tuple[Array, Array]]


def _mix(xp, value: Array) -> Array:
    """A 32-bit integer hash (the finaliser of MurmurHash3): the same numbers in NumPy and JAX."""
    value = (value ^ (value >> 16)) * xp.asarray(0x85EBCA6B, dtype=np.uint32)
    value = (value ^ (value >> 13)) * xp.asarray(0xC2B2AE35, dtype=np.uint32)
    return value ^ (value >> 16)


def _needs_static(axis: Axis, use: str, unknown: str) -> None:
    if not axis.is_static:
        raise UnsupportedError(
            f"random_blocks: {use} with a run-time query_offset are not supported, because {unknown} is only known "
            "once the offset is. Pass query_offset as an int."
        )


@dataclasses.dataclass(frozen=True, repr=False)
class RandomBlocks(_Primitive):
    block: int
    per_row: int
    seed: int

    def _is_empty(self, rows: Axis, cols: Axis) -> bool:
        """Whether there is no pair; block columns begin at position 0."""
        return self.per_row == 0 or rows.length == 0 or cols.length == 0 or cols.stop <= 0

    def _chosen(self, block_row: Array, num_cols: int) -> Array:
        """int32 [min(per_row, num_cols), lines]: distinct block columns in increasing order (Floyd's sampling)."""
        xp = array_namespace(block_row)
        base = _mix(xp, block_row.astype(np.uint32) + xp.asarray((self.seed * 0x9E3779B9) % 2**32, dtype=np.uint32))
        chosen: list[Array] = []
        picks = min(self.per_row, num_cols)
        for t in range(picks):
            top = num_cols - picks + t
            draw = _mix(xp, base + xp.asarray((t + 1) * 0x7F4A7C15 % 2**32, dtype=np.uint32))
            draw = (draw % xp.asarray(top + 1, dtype=np.uint32)).astype(np.int32)
            taken = xp.zeros(draw.shape, dtype=bool)
            for other in chosen:
                taken = taken | (other == draw)
            chosen.append(xp.where(taken, np.int32(top), draw))
        return xp.sort(xp.stack(chosen), axis=0)

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        _needs_static(cols, ".T", "the number of block columns")
        if self._is_empty(rows, cols):
            return []
        lo, hi = cols.start, cols.stop
        # The same choice serves all rows of a block: draw once a block where positions are known.
        num_cols = ceil_div(hi, self.block)
        if rows.is_static:
            first = rows.start // self.block
            blocks = np.arange(first, (rows.stop - 1) // self.block + 1, dtype=np.int32)
            chosen = self._chosen(blocks, num_cols)[:, rows.positions // self.block - first]
        else:
            chosen = self._chosen(rows.positions // self.block, num_cols)
        runs = [Run(1, c * self.block, self.block + 0 * c).clip(lo, hi) for c in chosen]
        return prune(coalesce(runs))

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        _needs_static(rows, "gradients", "which rows choose a block column")
        _needs_static(cols, ".T", "the number of block columns")
        if self._is_empty(rows, cols):
            return []
        num_cols = ceil_div(cols.stop, self.block)
        first = rows.start // self.block
        blocks = np.arange(first, (rows.stop - 1) // self.block + 1, dtype=np.int32)
        chosen = self._chosen(blocks, num_cols)
        # Sorting the (block column, block row) pairs lists the block rows of every block column.
        col, row = chosen.reshape(-1), np.tile(blocks, chosen.shape[0])
        order = np.lexsort((row, col))
        col, row = col[order], row[order]
        kth = np.arange(col.size) - np.searchsorted(col, col, side="left")
        width = int(kth.max(initial=-1)) + 1
        start, count = (np.zeros((width, num_cols), np.int32) for _ in range(2))
        start[kth, col], count[kth, col] = row * self.block, self.block
        at, inside = (cols.positions // self.block).clip(0), cols.positions >= 0
        lo, hi = rows.start, rows.stop
        runs = [Run(1, start[k, at], np.where(inside, count[k, at], 0)).clip(lo, hi) for k in range(width)]
        return prune(coalesce(runs))


@dataclasses.dataclass(frozen=True, repr=False)
class Neighborhood(_Primitive):
    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...] | int = 1
    causal: tuple[bool, ...] | bool = False

    def runs(self, rows: Axis, cols: Axis) -> list[Run]:
        return self._product(rows, cols, _neighbours, lambda kernel, _: kernel)

    def column_runs(self, cols: Axis, rows: Axis) -> list[Run]:
        return self._product(cols, rows, _neighbours_of, _most_queries)

    def _product(self, lines: Axis, cross: Axis, interval: Interval, most: Callable[[int, int], int]) -> list[Run]:
        total = math.prod(self.shape)
        has = f"neighborhood: a grid of shape {self.shape} has"
        check_positions(has, total, (lines, cross), "Give the grid's own shape.")
        xp = array_namespace(lines.start, cross.start)
        dims = len(self.shape)
        dilation = self.dilation if isinstance(self.dilation, tuple) else (self.dilation,) * dims
        causal = self.causal if isinstance(self.causal, tuple) else (self.causal,) * dims
        at = lines.positions
        axes = []  # per dimension: (first neighbour, count, dilation), first as a coordinate of the grid
        for n in reversed(range(dims)):
            rest = at // self.shape[n]
            x, at = at - rest * self.shape[n], rest
            if dilation[n] == 1:
                first, count = interval(xp, x, self.shape[n], self.kernel[n], causal[n])
            else:  # the positions of one residue are a grid of their own
                m = x // dilation[n]
                group = x - m * dilation[n]
                length = (self.shape[n] - group + dilation[n] - 1) // dilation[n]
                first, count = interval(xp, m, length, self.kernel[n], causal[n])
                first = first * dilation[n] + group
            shortest = self.shape[n] // dilation[n]  # of the dilation groups; some may be one longer
            axes.insert(0, (first, count, dilation[n], most(self.kernel[n], shortest)))
        # One run along the last dimension for each combination of neighbours in the others.
        weights = [math.prod(self.shape[n + 1 :]) for n in range(dims)]
        start = sum(first * weight for (first, *_), weight in zip(axes, weights, strict=True))
        whole = cross.is_static and (cross.start, cross.length) == (0, total)
        _, inside = lines.inside(total)
        # Where grids of different dilations meet at an edge, a run's residue follows no simple rule of the row.
        simple = all(d * w % dilation[-1] == 0 for d, w in zip(dilation[:-1], weights, strict=False))
        line_step = dilation[-1] if simple else None
        out = []
        for steps in itertools.product(*(range(longest) for *_, longest in axes[:-1])):
            here, moved = axes[-1][1], 0
            for step, weight, (_, count, step_dilation, _) in zip(steps, weights, axes, strict=False):
                moved += step * step_dilation * weight
                here = here if isinstance(count, int) else xp.where(step < count, here, 0)
            here = here if inside is None else xp.where(inside, here, 0)
            here = xp.broadcast_to(xp.asarray(here, dtype=np.int32), (lines.length,))
            run = Run(dilation[-1], start + moved if moved else start, here, line_step)
            out.append(run if whole else run.clip(cross.start, cross.stop))
        return prune(coalesce(without_empty(out)))


def _neighbours(xp, m: Array, length: Array, kernel: int, causal: bool) -> tuple[Array, Array]:
    """First neighbour and number of neighbours of m; all inside one dilation group.

    The number is an int where it is the same for all.
    """
    if causal:
        return xp.maximum(m - kernel + 1, 0), xp.minimum(m + 1, kernel)
    return xp.clip(m - kernel // 2, 0, length - kernel), kernel


def _neighbours_of(xp, n: Array, length: Array, kernel: int, causal: bool) -> tuple[Array, Array]:
    """First query and number of queries that have n as a neighbour: an interval, because `first` is monotone."""
    if causal:
        return n, xp.minimum(length - n, kernel)
    half = kernel // 2
    first = xp.where(n < kernel, 0, n - kernel + 1 + half)
    stop = xp.where(n >= length - kernel, length, n + half + 1)
    return first, stop - first


def _most_queries(kernel: int, shortest: int) -> int:
    """How many queries a key can have in one dimension whose shortest dilation group has `shortest` positions."""
    # Next to one edge: kernel + half. Only in a group shorter than two kernels can both edges shift towards a key.
    return kernel + kernel // 2 if shortest >= 2 * kernel else min(2 * kernel - 1, shortest + 1)


def random_blocks(block: int, per_row: int, seed: int) -> Pattern:
    """Per block row, `per_row` distinct random block columns (all of them where there are fewer).

    The choice is a hash of (seed, block row, number of block columns): the same on every machine and in every backend.
    """
    block, per_row = (
        check_int("random_blocks", "block", block, 1),
        check_int("random_blocks", "per_row", per_row, 0, 256),
    )
    return RandomBlocks(block, per_row, check_int("random_blocks", "seed", seed, 0))


def _each(value: Any, count: int = 1) -> tuple[Any, ...]:
    """One value per dimension: as given, or the same for all."""
    if isinstance(value, np.ndarray) and value.ndim:
        return tuple(value.tolist())
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * count


def neighborhood(
    shape: int | Sequence[int],
    kernel: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Pattern:
    """Neighbourhood attention (NATTEN's meaning) on a flattened 1-, 2- or 3-D grid.

    Every position attends to the `kernel` nearest positions of each dimension (of its own dilation group); near an
    edge the window is shifted inwards, so that its size never changes. In a causal dimension the window ends at the
    query's own coordinate and is cut at the edge.

    Args:
      shape: the grid, row-major. Positions are the grid's: a use with fewer than its product is part of the grid (a
        chunk, a prefix), one with more is refused.
      kernel, dilation, causal: one value, or one per dimension; `kernel * dilation <= shape` in every dimension.

    Source: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, arXiv 2204.07143; dilated: 2209.15001.
    """
    grid = _each(shape)
    if not 1 <= len(grid) <= 3:
        raise PatternError(f"neighborhood: shape must have 1 to 3 dimensions, but {grid} was given")
    grid = tuple(check_int("neighborhood", "shape", n, 1) for n in grid)

    def spread(name: str, value) -> tuple:
        values = _each(value, len(grid))
        if len(values) != len(grid):
            raise PatternError(
                f"neighborhood: {name} {values} does not fit shape {grid}: give one value or {len(grid)}"
            )
        return values

    kernels = tuple(check_int("neighborhood", "kernel", k, 1) for k in spread("kernel", kernel))
    dilations = tuple(check_int("neighborhood", "dilation", d, 1) for d in spread("dilation", dilation))
    flags = spread("causal", causal)
    if not all(isinstance(flag, (bool, np.bool_)) for flag in flags):
        raise PatternError(f"neighborhood: causal must be True or False, or one of them per dimension, not {causal!r}")
    flags = tuple(map(bool, flags))
    for length, k, d in zip(grid, kernels, dilations, strict=True):
        if k * d > length:
            raise PatternError(
                f"neighborhood: kernel * dilation must not exceed the grid, but {k} * {d} > {length} was given. "
                "Use a smaller kernel, or full() for a dimension that attends everywhere."
            )
    return Neighborhood(
        grid,
        kernels,
        dilations[0] if len(set(dilations)) == 1 else dilations,
        flags[0] if len(set(flags)) == 1 else flags,
    )


_CONSTRUCTORS.update(RandomBlocks="random_blocks", Neighborhood="neighborhood")
