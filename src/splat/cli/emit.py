"""`splat emit`: the generated program's text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splat.cli import options
from splat.cli.errors import check_out
from splat.files import replacing

NAME = "emit"


def command(
    pattern: options.PatternText,
    q_len: options.QLen = 256,
    kv_len: options.KVLen = None,
    query_offset: options.QueryOffset = 0,
    head_dim: options.HeadDim = 64,
    num_q_heads: options.NumQHeads = 1,
    num_kv_heads: options.NumKVHeads = None,
    batch: options.Batch = 1,
    dtype: options.DType = "float32",
    target: Annotated[
        str, typer.Option(help="xla (StableHLO), triton or cpp (kernels' source), or ptx (a compiled kernel).")
    ] = "xla",
    arch: Annotated[
        str | None, typer.Option(help="GPU kernels are for: sm_80, sm_90, sm_100 or gfx942; sm_90 where not given.")
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(
            help="One kernel: fwd, dq, dkdv; for cpp also backward, for GPUs delta, merge or sum; all where not "
            "given, for ptx fwd. Or an operation on values: sddmm, softmax, spmm or spmm_transposed."
        ),
    ] = None,
    block_q: options.BlockQ = None,
    block_kv: options.BlockKV = None,
    scale: Annotated[float | None, typer.Option(help="Of the scores; 1/sqrt(head dim) where not given.")] = None,
    logits_soft_cap: Annotated[float | None, typer.Option(help="Scores become cap * tanh(score / cap).")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the text there instead of printing it.")] = None,
) -> None:
    """Print the program that a pattern becomes, for one generator. Needs no GPU."""
    check_out(out)
    import splat

    text = splat.emit(
        pattern, q_len, kv_len, target=target, arch=arch, kernel=kernel, scale=scale,
        logits_soft_cap=logits_soft_cap, head_dim=head_dim,
        num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, batch=batch, dtype=dtype, query_offset=query_offset,
        block_q=block_q, block_kv=block_kv,
    )  # fmt: skip
    if out is None:
        typer.echo(text)
    else:
        with replacing(out) as written:
            written.write_text(text, encoding="utf-8")
        typer.echo(f"{len(text.splitlines()):,} lines: {out}")
