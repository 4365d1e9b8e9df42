"""The cost model: what tiles cost on a target. It ranks schedules; it does not promise times.

Everything is counted per head and batch entry on tile areas, because that is what every schedule choice changes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from splat.errors import ArgumentError
from splat.geometry import Spans
from splat.planning.kernels import kernel_configs
from splat.planning.target import Target
from splat.tiling import count_tiles

#: (block_q, block_kv) of the C++ kernels: 16 rows, one to a vector lane, and one key at a time. So the phases of a walk
#: are exact spans, to the column; larger tiles are the kernels' own business.
CPP_TILE = (16, 1)


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Costs of one implementation on one target, for one head dim and dtype.

    Attributes:
      block_q, block_kv: the tile sizes to choose from.
      element_s: seconds per computed score.
      row_s, col_s: seconds per tile row and per tile column (loads, rescaling; what large tiles save).
      tile_s: seconds per tile (loop overhead).
      pass_row_s: seconds per output row for writing and merging one more pass.
      predicts: whether the numbers were measured for this implementation; else they only rank schedules.
      shapes: (block_q, block_kv, seconds per score) of the kernels that there are, the usual one first; empty: any pair
        of the above at `element_s`.
    """

    implementation: str
    target: Target
    block_q: tuple[int, ...]
    block_kv: tuple[int, ...]
    element_s: float
    row_s: float
    col_s: float
    tile_s: float
    pass_row_s: float
    predicts: bool = True
    shapes: tuple[tuple[int, int, float], ...] = ()

    @property
    def tiles(self) -> tuple[Any, ...]:
        """What tile sizes there are to choose from."""
        return self.block_q, self.block_kv, self.shapes

    def kernel_block_q(self, block_q: int) -> int:
        """The rows that a kernel for tiles of `block_q` rows works on."""
        return min((b for b, _, _ in self.shapes if b >= block_q), default=block_q)

    def tiles_s(self, tiles: float, block_q: int, block_kv: int) -> float:
        """Seconds of `tiles` tiles."""
        element_s = next((s for *size, s in self.shapes if size == [block_q, block_kv]), self.element_s)
        tile = block_q * block_kv * element_s + block_q * self.row_s + block_kv * self.col_s + self.tile_s
        return float(tiles) * tile

    def best_block_kv(self, chains: list[list[Spans]], block_q: int, given: int | None) -> tuple[float, int]:
        """(seconds, block_kv) of the best tile width for chains of spans (`tiling.chains`) that share one pass."""
        widths = [span.width for chain in chains for span in chain]
        options = np.array([given] if given else self._widths(widths, block_q), np.int64)
        tiles = np.sum([count_tiles(chain, options) for chain in chains], axis=0)
        seconds = [self.tiles_s(float(n), block_q, int(b)) for n, b in zip(tiles, options, strict=True)]
        best = int(np.argmin(seconds))
        return seconds[best], int(options[best])

    def _widths(self, widths: list[np.ndarray], block_q: int) -> list[int]:
        if self.shapes:
            rows = self.kernel_block_q(block_q)
            return [width for b, width, _ in self.shapes if b == rows] or [width for _, width, _ in self.shapes]
        if self.implementation != "xla":
            return list(self.block_kv)
        # Any width serves the portable implementation: also try the usual span, whole or in halves.
        usual = [int(np.median(w[w > 0])) for w in widths if (w > 0).any()]
        fitted = {-(-u // (32 * parts)) * 32 for u in usual for parts in (1, 2, 3)}
        narrow = {-(-u // 8) * 8 for u in usual if u <= 32}
        return sorted(set(self.block_kv) | narrow | {min(max(f, 32), 1024) for f in fitted})


def cost_model(
    implementation: str, target: Target, head_dim: int, dtype: str, kernel: str = "forward", grouped: bool = False
) -> CostModel:
    """The model of `implementation` ("xla", "cpp", "triton") on `target`. Raises ArgumentError for another.

    `kernel` is "forward", "d_query" or "d_key_value": they differ in the tile sizes that there are, some of which are
    not for query heads that share key heads (`grouped`).
    """
    if implementation not in ("xla", "cpp", "triton"):
        raise ArgumentError(f"implementation must be 'triton', 'cpp' or 'xla', but {implementation!r} was given")
    if target.kind == "cpu" and implementation == "cpp":
        return _cpp_model(target, head_dim, dtype)
    matmul = target.matmul_flops.get(dtype, target.matmul_flops["float32"])
    if target.kind == "cpu":
        # Fitted to the portable implementation's measured times (benchmarks/calibrate.py): per score element
        # element_s + 75 ns * (1 + H/64) / 2 * (1/block_q + 1/block_kv), and some microseconds per tile.
        element = 4 * head_dim / matmul + 1 / target.exp_per_s
        edge = 75e-9 * (1 + head_dim / 64) / 2
        return CostModel(
            implementation, target, block_q=(32, 64, 128, 256), block_kv=(32, 64, 128, 256, 512), element_s=element,
            row_s=edge, col_s=edge, tile_s=4e-6, pass_row_s=3e-9 * head_dim, predicts=implementation == "xla",
        )  # fmt: skip
    # A multiprocessor's cycles per score: matrix products, then exponentials at 16 a cycle, hardly overlapped; for the
    # kernels there are, what their compiled loops say.
    cycle_s = 1 / (target.clock_hz * target.units)
    products = {"forward": 4, "d_query": 6, "d_key_value": 8}[kernel] * head_dim / (matmul * cycle_s)
    reach = target.efficiency.get(head_dim, 0.61)
    element_s = (products + 1 / 16) * cycle_s / reach
    load = 2 * head_dim * 2 / (target.bandwidth_bytes * 3)  # tiles come mostly from L2, about 3x main memory
    configs = kernel_configs(target.arch, kernel, head_dim, dtype, grouped) if implementation == "triton" else ()
    shapes = tuple((c.block_q, c.block_kv, c.cycles * cycle_s / reach or element_s) for c in configs)
    return CostModel(
        implementation, target, block_q=tuple(sorted({b for b, _, _ in shapes})) or (64, 128),
        block_kv=tuple(sorted({b for _, b, _ in shapes})) or (64, 128), element_s=element_s, row_s=0.0, col_s=load,
        tile_s=200 / target.clock_hz / target.units, pass_row_s=8 * head_dim / target.bandwidth_bytes,
        predicts=implementation == "triton" and bool(target.efficiency), shapes=shapes,
    )  # fmt: skip


def _cpp_model(target: Target, head_dim: int, dtype: str) -> CostModel:
    """Time goes into scores, 16 at a time; a further pass reads and writes its rows' results once more."""
    block_q, block_kv = CPP_TILE
    element = 4 * head_dim / target.attention_flops.get(dtype, target.attention_flops["float32"])
    return CostModel(
        "cpp", target, block_q=(block_q,), block_kv=(block_kv,), element_s=element, row_s=0.0, col_s=0.0, tile_s=0.0,
        pass_row_s=16 * head_dim / target.bandwidth_bytes, shapes=((block_q, block_kv, element),),
    )  # fmt: skip
