"""Pictures of plans. Figures are objects of their own: pyplot and its global state are not touched.

Places are inches from the figure's upper left corner, so that nothing depends on measured text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from splat.errors import ArgumentError
from splat.explain.raster import FULL, LABELS, PARTIAL, WASTED, rasterize
from splat.explain.text import expression, numbers, summary
from splat.planning import Plan, Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, FRAME = "#1a1a1a", "#666666", "#b8b8b8"
DPI = 150
FORMATS = ("png", "svg", "pdf")
CELLS = 400

#: Up to this length every pair is drawn by itself, and no part is shown beside.
EXACT_LENGTH = 512
MAX_OUTLINES = 6000


class Part(NamedTuple):
    """Rows and columns of a matrix, half open."""

    rows: tuple[int, int]
    cols: tuple[int, int]


class Outlines(NamedTuple):
    """Tiles inside a part: dense ones (left, top, width, height), and the pairs (row, column) of one lattice tile."""

    boxes: list[tuple[int, int, int, int]]
    lattice: np.ndarray
    lattice_tile: str


def picture_format(path: str | PathLike[str]) -> str:
    """What a picture is written as: the path's suffix; png where it has none. Raises ArgumentError for others."""
    suffix = Path(path).suffix
    if (name := suffix[1:].lower() or "png") not in FORMATS:
        spelled = ", ".join(f".{one}" for one in FORMATS)
        raise ArgumentError(f"pictures are written as {spelled}, but the file {Path(path).name} ends in {suffix}.")
    return name


def save_picture(plan: Plan, path: str | PathLike[str]) -> None:
    """Draws one plan: all of it, and beside it a part in which single pairs and tiles can be told apart.

    Written as the path ends: .png, .svg or .pdf. Raises PatternError for a run-time pattern, ArgumentError for a path
    that ends otherwise.
    """
    written_as = picture_format(path)
    schedule = plan.forward
    whole, exact = _whole(schedule), max(plan.acsr.shape) <= EXACT_LENGTH or not plan.nnz
    panel, gap, left = (6.4, 0.0, 0.8) if exact else (4.9, 0.95, 0.8)
    width = left + panel + (0 if exact else gap + panel) + 0.35
    title = textwrap.wrap(expression(plan, 320), int(9.6 * width))
    facts = textwrap.wrap(summary(plan), int(12.5 * width))
    top = 0.3 + 0.23 * len(title) + 0.2 * len(facts) + (0.3 if exact else 0.45)
    legend = 0.6
    figure = _figure(width, top + panel + 0.55 + legend)
    _text(figure, left - 0.55, 0.28, "\n".join(title), 11, INK, family="monospace", weight="bold")
    _text(figure, left - 0.55, 0.34 + 0.23 * len(title), "\n".join(facts), 9.5, FAINT)
    outlines = _panel(_axes(figure, left, top, panel, panel), schedule, whole, outlined=exact, labelled=True)
    if not exact:
        part = _part(schedule)
        _mark(figure.axes[0], part)
        beside = _axes(figure, left + panel + gap, top, panel, panel)
        outlines = _panel(beside, schedule, part, outlined=True, labelled=True)
        figure.axes[0].set_title("all", fontsize=9.5, color=FAINT, loc="left")
        beside.set_title("the framed part, pair by pair", fontsize=9.5, color=FAINT, loc="left")
    _legend(figure, outlines, framed=not exact)
    figure.savefig(path, format=written_as)


def save_strip(
    plans: Sequence[Plan],
    path: str | PathLike[str],
    *,
    zoom: bool = False,
    times_ms: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draws several plans side by side, each with its expression and numbers beneath.

    Args:
      zoom: below each, also a part of it pair by pair (only where it is too long to be drawn so).
      times_ms: name -> milliseconds, one per plan: a bar chart of them at the bottom.

    Path and errors as for `save_picture`.
    """
    written_as = picture_format(path)
    panel, gap, left, rows = 3.0, 0.55, 0.55, 2 if zoom else 1
    width = left + len(plans) * (panel + gap) - gap + 0.4
    titles = [textwrap.wrap(expression(plan, 120), 29) for plan in plans]
    caption = 0.2 * max(len(title) for title in titles) + 0.55
    bars = 0.0 if times_ms is None else 0.4 + 0.24 * len(plans) * (len(times_ms) + 0.6)
    below = 0.25 + rows * (panel + 0.35)  # the end of the panels
    figure = _figure(width, below + caption + bars + 0.5)
    outlines, framed = Outlines([], np.zeros((0, 2)), ""), False
    for n, (plan, title) in enumerate(zip(plans, titles, strict=True)):
        x, exact = left + n * (panel + gap), max(plan.acsr.shape) <= EXACT_LENGTH
        axes = _axes(figure, x, 0.25, panel, panel)
        outlines = _merged(outlines, _panel(axes, plan.forward, _whole(plan.forward), outlined=exact, labelled=False))
        if zoom:
            part = _whole(plan.forward) if exact else _part(plan.forward)
            framed |= not exact
            if not exact:
                _mark(axes, part)
            second = _axes(figure, x, 0.25 + panel + 0.35, panel, panel)
            outlines = _merged(outlines, _panel(second, plan.forward, part, outlined=True, labelled=False))
        _text(figure, x, below, "\n".join(title), 10, INK, family="monospace", weight="bold")
        _text(figure, x, below + 0.2 * len(title) + 0.04, _caption(plan), 8.5, FAINT)
    if times_ms is not None:
        _bars(_axes(figure, left + 2.3, below + caption + 0.25, width - left - 3.0, bars - 0.4), titles, times_ms)
    _legend(figure, outlines, framed=framed)
    figure.savefig(path, format=written_as)


def _caption(plan: Plan) -> str:
    n = numbers(plan)
    tiles = f"{n['full']} full + {n['partial']} partial tiles"
    return f"{n['q_len x kv_len']}, density {n['density']}\n{tiles}, waste {n['waste']}"


# -- panels ------------------------------------------------------------------------------------------------------------


def _panel(axes: Axes, schedule: Schedule, part: Part, *, outlined: bool, labelled: bool) -> Outlines:
    """One part of a schedule; with its tiles' outlines where `outlined`."""
    (top, bottom), (left, right) = part
    raster = rasterize(schedule, (EXACT_LENGTH, EXACT_LENGTH) if outlined else (CELLS, CELLS), *part)
    ratio = max(bottom - top, 1) / max(right - left, 1)
    axes.imshow(
        raster.colors(), extent=(left, max(right, left + 1), max(bottom, top + 1), top), interpolation="nearest",
        aspect="equal" if 1 / 4 <= ratio <= 4 else "auto",
    )  # fmt: skip
    axes.set_anchor("NW")
    axes.tick_params(length=2, labelsize=7.5, colors=FAINT)
    axes.locator_params(nbins=5, integer=True)
    for axis, span in ((axes.xaxis, right - left), (axes.yaxis, bottom - top)):
        axis.set_major_formatter(_in_thousands if span >= 50_000 else "{x:,.0f}")
    for spine in axes.spines.values():
        spine.set(color=FRAME, linewidth=0.8)
    if labelled:
        axes.set_xlabel("key position j", fontsize=9, color=FAINT)
        axes.set_ylabel("query row i", fontsize=9, color=FAINT)
    outlines = find_outlines(schedule, part) if outlined else Outlines([], np.zeros((0, 2)), "")
    _draw_outlines(axes, outlines, part)
    return outlines


def _in_thousands(value: float, _: float | None = None) -> str:
    return f"{value / 1000:,.10g}k" if value else "0"


def _draw_outlines(axes: Axes, outlines: Outlines, part: Part) -> None:
    from matplotlib.collections import PolyCollection

    if outlines.boxes:
        x, y, w, h = np.array(outlines.boxes, float).T
        corners = np.stack([np.stack([x, x + w, x + w, x]), np.stack([y, y, y + h, y + h])]).transpose(2, 1, 0)
        boxes = PolyCollection(list(corners), facecolors="none", edgecolors=INK, linewidths=0.55, alpha=0.75)
        axes.add_collection(boxes, autolim=False)
    if outlines.lattice.size:
        # A pair may be a pixel or two: its mark is larger, as far as the neighbours of its tile leave room.
        spacing = np.diff(np.unique(outlines.lattice[:, 1])).min(initial=1 << 30)
        side = max(1.0, min((part.cols[1] - part.cols[0]) / 95, spacing / 3))
        y, x = outlines.lattice.T + 0.5
        d = side / 2
        corners = np.stack([np.stack([x - d, x + d, x + d, x - d]), np.stack([y - d, y - d, y + d, y + d])])
        axes.add_collection(PolyCollection(list(corners.transpose(2, 1, 0)), facecolors=INK), autolim=False)
    (top, bottom), (left, right) = part
    axes.set(xlim=(left, max(right, left + 1)), ylim=(max(bottom, top + 1), top))


def find_outlines(schedule: Schedule, part: Part) -> Outlines:
    """The dense tiles that meet a part, and the points inside it of one lattice tile: the one that shows most."""
    boxes: list[tuple[int, int, int, int]] = []
    best, name = np.zeros((0, 2), np.int64), ""
    for one in schedule.passes:
        slots = one.tiles.rows
        valid = slots < schedule.acsr.shape[0]
        first, last = slots.min(axis=1), np.where(valid, slots, -1).max(axis=1)
        dense = last - first + 1 == valid.sum(axis=1)
        meets = ((slots >= part.rows[0]) & (slots < part.rows[1])).any(axis=1)
        for walk in one.walks:
            x_left = (part.cols[0] - walk.residue) // walk.stride - walk.begin
            x_right = -((walk.residue - part.cols[1]) // walk.stride) - walk.begin
            t_first = np.maximum(x_left // walk.block_kv, 0)
            t_last = np.minimum(-(-x_right // walk.block_kv), walk.num_tiles)
            for tile in np.flatnonzero(meets & (t_last > t_first)):
                for t in range(t_first[tile], t_last[tile]):
                    x = int(walk.begin[tile]) + t * walk.block_kv
                    if walk.stride == 1 and dense[tile]:
                        if len(boxes) < MAX_OUTLINES:
                            boxes.append((x, int(first[tile]), walk.block_kv, slots.shape[1]))
                        continue
                    cols = walk.residue[tile] + walk.stride * (x + np.arange(walk.block_kv))
                    rows = slots[tile][valid[tile]]
                    rows = rows[(rows >= part.rows[0]) & (rows < part.rows[1])]
                    cols = cols[(cols >= part.cols[0]) & (cols < part.cols[1])]
                    if rows.size * cols.size > best.shape[0]:
                        best = np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1).reshape(-1, 2)
                        name = f"{slots.shape[1]} x {walk.block_kv}"
    return Outlines(boxes, best, name)


def _merged(a: Outlines, b: Outlines) -> Outlines:
    """For one legend of several panels: what any of them has."""
    return Outlines(a.boxes or b.boxes, a.lattice if a.lattice.size else b.lattice, a.lattice_tile or b.lattice_tile)


def _whole(schedule: Schedule) -> Part:
    return Part((0, schedule.acsr.shape[0]), (0, schedule.acsr.shape[1]))


def _part(schedule: Schedule) -> Part:
    """The part that shows most: where blank, full, partial and wasted are most evenly mixed.

    Tried are the middle row's diagonal, the ends of its runs, and the upper left corner.
    """
    num_rows, num_cols = schedule.acsr.shape
    dense = [d for d in schedule.decisions if d.step == 1]
    wanted = [2.4 * max(d.block_q, min(d.block_kv, 256)) for d in dense]
    wanted += [2.5 * c.stride for c in schedule.acsr.components if 2.5 * c.stride <= 384]
    size = int(np.clip(max(wanted, default=0), 192, 384))
    middle = num_rows // 2
    ends = [middle * num_cols // max(num_rows, 1)]
    for c in schedule.acsr.components:
        if c.count.size and c.count[middle] > 0:
            ends += [int(c.start[middle]), int(c.start[middle] + c.stride * c.count[middle])]
    best, part = -1.0, Part((0, min(size, num_rows)), (0, min(size, num_cols)))
    for row, col in [*((middle, end) for end in dict.fromkeys(ends)), (0, 0)]:
        top = max(min(row - size // 2, num_rows - size), 0)
        left = max(min(col - size // 2, num_cols - size), 0)
        here = Part((top, min(top + size, num_rows)), (left, min(left + size, num_cols)))
        mean = rasterize(schedule, (64, 64), *here).shares.mean(axis=(0, 1))
        shares = np.append(mean, max(1 - mean.sum(), 0))
        shares = shares[shares > 0] / shares.sum()
        entropy = -float((shares * np.log(shares)).sum())
        if entropy > best + (0.2 if (row, col) == (0, 0) else 1e-9):  # the corner only where it shows more
            best, part = entropy, here
    return part


# -- parts of a figure -------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    w, h = figure.get_size_inches()
    return figure.add_axes((x / w, 1 - (y + height) / h, width / w, height / h))


def _text(figure: Figure, x: float, y: float, text: str, size: float, color: str, **kwargs: Any) -> None:
    """Text whose first line hangs at y."""
    w, h = figure.get_size_inches()
    figure.text(x / w, 1 - y / h, text, fontsize=size, color=color, va="top", linespacing=1.3, **kwargs)


def _mark(axes: Axes, part: Part) -> None:
    """A frame around the part that is shown beside; at least visible, however short it is."""
    from matplotlib.patches import Rectangle

    (top, bottom), (left, right) = part
    shown_w, shown_h = abs(np.diff(axes.get_xlim())[0]), abs(np.diff(axes.get_ylim())[0])
    w, h = max(right - left, shown_w / 60), max(bottom - top, shown_h / 60)
    corner = ((left + right - w) / 2, (top + bottom - h) / 2)
    axes.add_patch(Rectangle(corner, w, h, fill=False, edgecolor="#c1272d", linewidth=1.4, clip_on=False))


def _legend(figure: Figure, outlines: Outlines, *, framed: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(facecolor=color, label=LABELS[color]) for color in (FULL, PARTIAL, WASTED)]
    if outlines.boxes:
        handles.append(Patch(facecolor="none", edgecolor=INK, linewidth=0.8, label="tile"))
    if outlines.lattice.size:
        label = f"points of one {outlines.lattice_tile} lattice tile"
        handles.append(Line2D([], [], linestyle="none", marker="s", markersize=4, color=INK, label=label))
    if framed:
        handles.append(Patch(facecolor="none", edgecolor="#c1272d", linewidth=1.4, label="shown pair by pair"))
    columns = len(handles) if figure.get_size_inches()[0] > 1.85 * len(handles) else 3
    figure.legend(
        handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=8.5, labelcolor=INK,
        handlelength=1.3, columnspacing=1.6, borderaxespad=0.5,
    )  # fmt: skip


def _bars(axes: Axes, titles: list[list[str]], times_ms: Mapping[str, Sequence[float]]) -> None:
    """Horizontal bars, a group per plan; the first series is ours."""
    shades = (FULL, "#a6a6a6", "#cfcfcf")
    slots = len(times_ms) + 0.6
    for k, (name, values) in enumerate(times_ms.items()):
        y = [n * slots + k for n in range(len(titles))]
        bars = axes.barh(y, list(values), height=0.82, color=shades[k % 3], label=name)
        axes.bar_label(bars, [f"{name} {value:,.0f} ms" for value in values], fontsize=8, color=INK, padding=4)
    axes.set_yticks([n * slots + (len(times_ms) - 1) / 2 for n in range(len(titles))])
    axes.set_yticklabels(["\n".join(title) for title in titles], fontsize=8, family="monospace")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * max(max(values) for values in times_ms.values()))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(FRAME)
