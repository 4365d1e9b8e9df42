"""Numbers of a plan, and its picture in characters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from splat.explain.raster import LABELS, rasterize
from splat.planning import Plan
from splat.tiling import Phase


def numbers(plan: Plan) -> dict[str, str]:
    """The numbers worth reading about a plan's forward, ready to print."""
    rows, cols = plan.acsr.shape
    passes = plan.forward.passes
    tiles, full = sum(one.num_tiles for one in passes), sum(one.count(Phase.FULL) for one in passes)
    out = {
        "q_len x kv_len": f"{rows:,} x {cols:,}" + (f" from {plan.query_offset:,}" if plan.query_offset else ""),
        "non-zeros": f"{plan.nnz:,}",
        "density": f"{plan.density:.2%}" if plan.density > 0.01 else f"{plan.density:.4%}",
        "empty rows": f"{plan.empty_rows:,}",
        "components": f"{len(plan.acsr.components)}, {plan.acsr.metadata_bytes:,} B",
        "passes": f"{len(passes)}",
        "tiles": f"{tiles:,}",
        "full": f"{full:,}",
        "partial": f"{tiles - full:,}",
        "waste": f"{plan.waste:.3f}",
    }
    for n, one in enumerate(passes):
        d = one.decision
        out[f"pass {n}"] = f"{d.block_q} x {d.block_kv}, " + ("row map" if d.step is None else f"row step {d.step}")
    return out


def summary(plan: Plan) -> str:
    """The key numbers in one line."""
    n = numbers(plan)
    passes = "1 pass" if n["passes"] == "1" else f"{n['passes']} passes"
    return (
        f"{n['q_len x kv_len']}, {n['non-zeros']} pairs, density {n['density']}, "
        f"{n['tiles']} tiles ({n['full']} full, {n['partial']} partial), waste {n['waste']}, {passes}"
    )


def expression(plan: Plan, limit: int = 160) -> str:
    """The pattern as text, cut where it holds long arrays."""
    text = repr(plan.problem.pattern)
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A plan for `rich.console.Console.print`: a picture of `width` columns and its numbers.

    Coloured half blocks where the console has colours; without them, characters from dark to light.
    """

    plan: Plan
    width: int = 64

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table
        from rich.text import Text

        width = max(min(self.width, options.max_width - 2), 8)
        rows, cols = self.plan.acsr.shape
        height = max(2 * round(width / 2 * min(max(rows / max(cols, 1), 1 / 8), 1)), 2)  # in cells, two a line
        colored = not (console.no_color or console.color_system is None)
        glyphs = "█▓░·" if console.encoding.lower().startswith("utf") else "#+-."
        if colored and glyphs[0] == "█":
            picture, legend = self._colored(width, height), Text()
            for color, label in LABELS.items():
                legend.append("█ ", color).append(f"{label}\n")
        else:
            picture = self._plain(width, height // 2, glyphs)
            labels = (*LABELS.values(), "less than a tenth of a cell")
            legend = Text("\n".join(f"{glyph} {label}" for glyph, label in zip(glyphs, labels, strict=True)))
        picture.no_wrap = True
        table = Table.grid(padding=(0, 2))
        for name, value in numbers(self.plan).items():
            table.add_row(Text(name, "dim"), Text(value))
        side = Table.grid()
        side.add_row(Text(""))
        side.add_row(table)
        side.add_row(Text(""))
        side.add_row(legend)
        yield Text(expression(self.plan), "bold")
        if options.max_width >= width + 44:
            both = Table.grid(padding=(0, 2))
            both.add_row(picture, side)
            yield both
        else:
            yield picture
            yield side

    def _colored(self, width: int, height: int) -> Any:
        """Two cells a character: the upper half is its foreground, the lower its background."""
        from rich.text import Text

        raster = rasterize(self.plan.forward, (height, width))
        colors = _grown(raster.colors(), height, width)
        picture = Text()
        for upper, lower in zip(colors[0::2], colors[1::2], strict=True):
            both = np.concatenate([upper, lower], axis=1)
            changes = np.flatnonzero((both[1:] != both[:-1]).any(axis=1)) + 1
            for same in np.split(both, changes):  # runs of one style: far fewer escape sequences
                r, g, b, *low = same[0]
                picture.append("▀" * len(same), f"rgb({r},{g},{b}) on rgb({low[0]},{low[1]},{low[2]})")
            picture.append("\n")
        return picture

    def _plain(self, width: int, height: int, glyphs: str) -> Any:
        """One cell a character: what it holds most of."""
        from rich.text import Text

        shares = rasterize(self.plan.forward, (height, width)).shares
        total = shares.sum(axis=-1)
        kind = np.where(total < 0.1, 3, shares.argmax(axis=-1))
        kind = _grown(np.where(total > 1e-12, kind, 4), height, width)
        lines = ["".join((glyphs + " ")[k] for k in line) for line in kind]
        bar = ("│", "─", "┌┐└┘") if glyphs[0] == "█" else ("|", "-", "++++")
        framed = [bar[2][0] + bar[1] * width + bar[2][1], *(f"{bar[0]}{line}{bar[0]}" for line in lines)]
        return Text("\n".join([*framed, bar[2][2] + bar[1] * width + bar[2][3]]))


def _grown(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """Short matrices have fewer cells than the picture: repeat them."""
    rows = np.arange(height) * cells.shape[0] // height
    return cells[rows][:, np.arange(width) * cells.shape[1] // width]
