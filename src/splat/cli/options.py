"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PatternText = Annotated[
    str, typer.Argument(metavar="PATTERN", help='The pattern, such as "causal() & window(512) | sink(4)".')
]
QLen = Annotated[int, typer.Option(min=1, help="Query positions.")]
KVLen = Annotated[int | None, typer.Option(min=1, help="Key positions; as many as queries where not given.")]
QueryOffset = Annotated[int, typer.Option(help="Row i is position i + this.")]
BlockQ = Annotated[int | None, typer.Option(help="Rows of a tile; the cost model chooses where not given.")]
BlockKV = Annotated[int | None, typer.Option(help="Columns of a tile; the cost model chooses where not given.")]
HeadDim = Annotated[int, typer.Option(help="Head dimension.")]
NumQHeads = Annotated[int, typer.Option(help="Query heads.")]
NumKVHeads = Annotated[int | None, typer.Option(help="Key/value heads; as many as query heads where not given.")]
Batch = Annotated[int, typer.Option(help="Sequences.")]
DType = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
PictureOut = Annotated[Path | None, typer.Option(help="Also write a picture there: .png, .svg or .pdf.")]
