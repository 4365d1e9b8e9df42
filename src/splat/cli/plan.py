"""`splat plan`: what would run, and what it would cost."""

from __future__ import annotations

from typing import Annotated

import typer

from splat.cli import options

NAME = "plan"


def command(
    pattern: options.PatternText,
    q_len: options.QLen = 4096,
    kv_len: options.KVLen = None,
    query_offset: options.QueryOffset = 0,
    head_dim: options.HeadDim = 64,
    num_q_heads: options.NumQHeads = 1,
    num_kv_heads: options.NumKVHeads = None,
    batch: options.Batch = 1,
    dtype: options.DType = "float32",
    target: Annotated[str, typer.Option(help="Device to plan for: cpu, a100, h100, h200, b200 or mi300x.")] = "cpu",
    implementation: Annotated[str | None, typer.Option(help="xla, cpp or triton; the best where not given.")] = None,
    block_q: options.BlockQ = None,
    block_kv: options.BlockKV = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print the plan of attention by a pattern: passes, tile sizes, waste, predicted times. No device is touched."""
    import splat

    made = splat.plan(
        pattern, q_len, kv_len, head_dim=head_dim, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, batch=batch,
        dtype=dtype, query_offset=query_offset, target=target, implementation=implementation, block_q=block_q,
        block_kv=block_kv,
    )  # fmt: skip
    typer.echo(made.to_json() if json else str(made))
