"""Prefill and decode with a sparse pattern and a fixed key/value cache, in PyTorch, checked against dense attention.

    python examples/torch_decode.py           # on a CUDA or ROCm GPU, else on the CPU

A prompt is attended to in one call; then each new token attends to the cache through the same pattern, at its position
(`query_offset`). Kernels are compiled for the prompt and for the first steps, not for every position.
"""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps")
    quick = parser.parse_args(argv).quick

    import torch

    import splat
    import splat.torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompt, steps, window = (40, 8, 16) if quick else (4000, 64, 1024)
    pattern = splat.causal() & splat.window(window) | splat.sink(4)

    generator = torch.Generator(device).manual_seed(0)
    length = prompt + steps
    q = torch.randn(1, 8, length, 64, generator=generator, device=device)
    keys, values = (torch.randn(1, 2, length, 64, generator=generator, device=device) for _ in range(2))
    mask = torch.from_numpy(pattern.to_dense(length)).to(device)
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

    # What is not written yet holds NaN: the pattern is causal, so that nothing of it is ever read.
    k_cache, v_cache = torch.full_like(keys, torch.nan), torch.full_like(values, torch.nan)

    def advance(start: int, stop: int) -> torch.Tensor:
        k_cache[:, :, start:stop], v_cache[:, :, start:stop] = keys[:, :, start:stop], values[:, :, start:stop]
        lengths = torch.full((1,), stop, device=device)
        return splat.torch.attention(
            q[:, :, start:stop], k_cache, v_cache, pattern, query_offset=start, kv_lengths=lengths
        )

    outputs = [advance(0, prompt), *(advance(at, at + 1) for at in range(prompt, length))]
    error = (torch.cat(outputs, dim=2) - expected).abs().max().item()
    print(f"{pattern}: a prompt of {prompt}, then {steps} tokens one by one, on {device}")
    print(f"largest difference from dense attention: {error:.1e}")
    return 0 if error < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
