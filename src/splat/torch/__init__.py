"""SPLAT for PyTorch: attention by a pattern, as an operation that autograd and `torch.compile` know.

    import splat, splat.torch
    p   = splat.causal() & splat.window(512) | splat.sink(4)
    out = splat.torch.attention(q, k, v, p)    # q [B, N, T, H], k and v [B, K, S, H], as torch's own attention

Patterns are those of `splat`; the kernels are generated: Triton for NVIDIA and AMD GPUs, C++ for
CPUs. JAX is never imported.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401 (the sentence below is for who does not have it)
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "splat.torch needs PyTorch, which is not installed: `pip install splat-attention[torch]`.", name="torch"
    ) from error

from splat.torch.attention import attention
from splat.torch.sdpa import scaled_dot_product_attention

__all__ = ["attention", "scaled_dot_product_attention"]
