"""PyTorch's peers: FlexAttention, compiled, with the pattern's block mask made beforehand; and dense attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

import splat
from benchmarks import peers

#: (query, key, value) [1, N, T, H] -> output.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

#: The sizes of FlexAttention's block masks to try: the first is its default.
BLOCKS = (128, 64)

#: Where its default tiles do not fit a block mask of 64: tiles that do.
SMALL_TILES = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64,
               "bwd_BLOCK_N2": 64}  # fmt: skip


@dataclasses.dataclass
class Flex:
    """FlexAttention with one block size. Compiled on a GPU; on the CPU it is called as it is."""

    text: str
    block: int
    device: str
    options: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"flex {self.block}"

    def build(self, q_len: int) -> Attention:
        mask = block_mask(self.text, q_len, self.block, self.device)
        function: Any = flex_attention.flex_attention
        if self.device == "cuda":
            allow_recompiling()
            function = torch.compile(function, dynamic=False, fullgraph=True)

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return function(query, key, value, block_mask=mask, kernel_options=self.options)

        return attention

    def other(self) -> Flex | None:
        """What to try where this is refused: its default tiles may not fit the block."""
        return None if self.options or self.block >= BLOCKS[0] else dataclasses.replace(self, options=SMALL_TILES)


def allow_recompiling() -> None:
    """One process compiles for several masks and lengths: more often than PyTorch thinks is sensible."""
    config: Any = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, 128)


def mask_mod(text: str, q_len: int, device: str) -> Callable[..., Tensor]:
    """The pattern as FlexAttention wants it."""

    def table(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    formula = peers.mask_formula(text, q_len, table)
    return lambda b, h, q, k: formula(q, k)


def block_mask(text: str, q_len: int, block: int, device: str) -> Any:
    """What `create_block_mask` makes, a row of blocks at a time: eagerly it needs 16 GB at 32K positions.

    Preparing is measured elsewhere (`masks`), with `create_block_mask` itself.
    """
    mod = mask_mod(text, q_len, device)
    counts = peers.block_counts(lambda q, k: mod(0, 0, q, k), q_len, block, lambda a: torch.from_numpy(a).to(device))
    counts = torch.stack(counts)
    full = counts == block * block
    lists = [torch.sum(kind, -1, dtype=torch.int32) for kind in ((counts > 0) & ~full, full)]
    order = [
        torch.argsort(kind.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
        for kind in ((counts > 0) & ~full, full)
    ]
    (partial, whole), (partial_at, whole_at) = lists, order
    return flex_attention.BlockMask.from_kv_blocks(
        partial[None, None], partial_at[None, None], whole[None, None], whole_at[None, None],
        BLOCK_SIZE=block, mask_mod=mod, seq_lengths=(q_len, q_len),
    )  # fmt: skip


@dataclasses.dataclass
class Dense:
    """PyTorch's dense attention through FlashAttention: causal where the pattern is, else of all pairs."""

    causal: bool
    device: str
    name: str = "dense"

    def build(self, q_len: int) -> Attention:
        backend = SDPBackend.FLASH_ATTENTION if self.device == "cuda" else SDPBackend.MATH

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)

        return attention

    def other(self) -> None:
        return None


def is_causal(pattern: splat.Pattern, q_len: int) -> bool:
    """Whether no key lies behind its query. Of the pairs alone: a plan needs JAX."""
    return splat.build(pattern & splat.causal(), q_len).nnz == splat.build(pattern, q_len).nnz
