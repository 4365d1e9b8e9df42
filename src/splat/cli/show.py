"""`splat show`: a pattern, its tiles and their numbers, in the terminal and as a picture."""

from __future__ import annotations

from typing import Annotated

import typer

from splat.cli import options
from splat.cli.errors import check_out
from splat.files import replacing

NAME = "show"


def command(
    pattern: options.PatternText,
    q_len: options.QLen = 4096,
    kv_len: options.KVLen = None,
    query_offset: options.QueryOffset = 0,
    block_q: Annotated[int, typer.Option(help="Rows of a tile.")] = 64,
    block_kv: Annotated[int, typer.Option(help="Columns of a tile.")] = 64,
    out: options.PictureOut = None,
) -> None:
    """Draw a pattern and its tiles, with the numbers: non-zeros, tiles full and partial, waste."""
    check_out(out, picture=True)
    from rich.console import Console

    import splat
    from splat.explain import Drawing, save_picture, save_strip
    from splat.pattern import PerHead

    console = Console()
    parsed = splat.parse(pattern)
    groups = parsed.groups() if isinstance(parsed, PerHead) else {parsed: []}
    plans = [
        splat.plan(one, q_len, kv_len, query_offset=query_offset, block_q=block_q, block_kv=block_kv) for one in groups
    ]
    for made, heads in zip(plans, groups.values(), strict=True):
        if heads:
            console.print(f"heads {', '.join(map(str, heads))}:", highlight=False)
        console.print(Drawing(made))
    if out is not None:
        with replacing(out) as written:
            if len(plans) == 1:
                save_picture(plans[0], written)
            else:
                save_strip(plans, written, zoom=True)
        console.print(f"picture: {out}", markup=False, highlight=False, soft_wrap=True)
