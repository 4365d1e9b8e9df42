"""Pictures of a run, as SVG: speed-ups, time and memory by length, waste, planning."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

from splat.bench import summary
from splat.bench.record import Record, Run
from splat.bench.suites import family

#: Up to eight contenders, told apart without red against green (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#000000")
MOST_COLUMNS = 4
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
      name: of a file.
      caption: what it says.
      draw: draws it into a new matplotlib figure.
      task: what it is of; none where of all.
    """

    name: str
    caption: str
    draw: Callable[[], Any]
    task: str | None = None

    def svg(self) -> str:
        return self._render("svg").decode("utf-8")

    def png(self) -> bytes:
        return self._render("png")

    def _render(self, form: str) -> bytes:
        import matplotlib

        # Text stays text: smaller, and searchable. The salt makes files comparable.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name, "font.size": 9.0}):
            figure = self.draw()
            out = io.BytesIO()
            figure.savefig(out, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
            return out.getvalue()


def plots(run: Run) -> list[Plot]:
    """Those that the run has numbers for."""
    out = []
    for task in run.tasks:
        lengths = {record.q_len for record in run.of_task(task)}
        rivals = summary.rivals(run, task)
        if task != "planning" and rivals:
            chosen = _by_density if _has_densities(run, task) else _by_case
            several = [n for n in sorted(lengths) if len({r.case for r in run.of_task(task) if r.q_len == n}) > 1]
            out += [chosen(run, task, q_len) for q_len in several or sorted(lengths)[:1]]
        if len(lengths) > 1:
            out.append(_by_length(run, task, summary.time_ms, "milliseconds", "time"))
            if summary.curves(run, task, _megabytes):
                out.append(_by_length(run, task, _megabytes, "peak MB of a call", "memory"))
    if any(record.waste for record in run.records):
        out.append(_waste(run))
    return out


def _slug(task: str) -> str:
    return task.replace(", ", "-")


def _figure(width: float, height: float, number: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """A figure and so many axes, four in a row at most; without pyplot: nothing is kept, no screen is needed."""
    from matplotlib.figure import Figure

    rows, columns = -(-number // MOST_COLUMNS), min(number, MOST_COLUMNS)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for ax in axes[number:]:
        ax.set_axis_off()
    axes = axes[:number]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _style(names: Sequence[str], name: str) -> dict[str, Any]:
    n = list(names).index(name)
    return {"color": COLORS[n % len(COLORS)], "marker": MARKERS[n % len(MARKERS)], "markersize": 4, "linewidth": 1.4}


def _megabytes(record: Record, name: str) -> float | None:
    size = summary.memory_bytes(record, name)
    return None if size is None else size / 1e6


# -- speed-ups ---------------------------------------------------------------------------------------------------------


def _has_densities(run: Run, task: str) -> bool:
    """Whether cases come in families of several densities, as the paper's do."""
    records = run.of_task(task)
    return all("," in record.case and record.case.endswith("%") for record in records)


def _plain_log_axis(ax: Any, text: str) -> None:
    """Logarithmic, ticks written out, a line at 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.axhline(1, color="black", linewidth=0.8)
    low, high = ax.get_ylim()
    few = (1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0, 8.0, 9.0)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=few if high < 5 * low else (1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text.format(value)))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _by_density(run: Run, task: str, q_len: int) -> Plot:
    records = [record for record in run.of_task(task) if record.q_len == q_len]
    families = list(dict.fromkeys(family(record.case) for record in records))
    rivals = [rival for rival in summary.rivals(run, task) if rival != summary.BEST_SPARSE]
    first = summary.first_of(run, task)

    def draw() -> Any:
        figure, axes = _figure(max(3.1 * len(families) + 0.4, 6.5), 3.1, len(families), sharey=True)
        for ax, one in zip(axes, families, strict=True):
            members = [record for record in records if family(record.case) == one]
            for rival in rivals:
                points = [(100 * r.density, value) for r in members if (value := summary.faster(run, r, rival))]
                if points:
                    ax.plot(
                        *zip(*sorted(points), strict=True), label=summary.short(rival, first), **_style(rivals, rival)
                    )
            _plain_log_axis(ax, "{:g}x")
            ax.set_title(one)
            ax.set_xlabel("non-zeros, %")
            ax.set_xlim(0, 55)
        axes[0].set_ylabel(f"{first} is faster by")
        handles, labels = _all_labels(axes)
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), frameon=False)
        return figure

    caption = (
        f"{task}, {q_len:,} positions: how many times {first} is faster, by pattern and density. "
        "Below the line the other one is faster."
    )
    return Plot(f"speedup-{_slug(task)}-{q_len}", caption, draw, task)


def _by_case(run: Run, task: str, q_len: int) -> Plot:
    records = [record for record in run.of_task(task) if record.q_len == q_len]
    rivals = [rival for rival in summary.rivals(run, task) if rival != summary.BEST_SPARSE]
    first = summary.first_of(run, task)

    def draw() -> Any:
        figure, (ax,) = _figure(max(6.5, 1.1 * len(records) + 1.5), 3.4)
        width = 0.8 / len(rivals)
        for n, rival in enumerate(rivals):
            points = [(at, value) for at, r in enumerate(records) if (value := summary.faster(run, r, rival))]
            if points:
                at, values = zip(*points, strict=True)
                places = [x + (n - (len(rivals) - 1) / 2) * width for x in at]
                bars = ax.bar(
                    places, values, width * 0.92, label=summary.short(rival, first), color=COLORS[n % len(COLORS)]
                )
                if len(rivals) * len(records) <= 24:
                    ax.bar_label(bars, fmt="%.3g", fontsize=7)
        _plain_log_axis(ax, "{:g}x")
        ax.set_ylim(bottom=min(ax.get_ylim()[0], 0.9))
        _case_axis(ax, [record.case for record in records])
        ax.set_ylabel(f"{first} is faster by")
        figure.legend(*_all_labels([ax]), loc="outside upper center", ncols=6, frameon=False)
        return figure

    caption = f"{task}, {q_len:,} positions: how many times {first} is faster."
    return Plot(f"speedup-{_slug(task)}-{q_len}", caption, draw, task)


def _case_axis(ax: Any, names: Sequence[str]) -> None:
    ax.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    ax.tick_params(axis="x", rotation=30 if len(names) > 5 else 0, length=0)
    if len(names) > 5:
        for label in ax.get_xticklabels():
            label.set_horizontalalignment("right")
    ax.grid(axis="x", visible=False)


def _all_labels(axes: Sequence[Any]) -> tuple[list[Any], list[str]]:
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)


# -- by length ---------------------------------------------------------------------------------------------------------


def _by_length(run: Run, task: str, value: Callable[[Record, str], float | None], label: str, what: str) -> Plot:
    curves = summary.curves(run, task, value)
    cases = list(dict.fromkeys(case for _, case in curves))
    names = list(dict.fromkeys(name for name, _ in curves))

    def draw() -> Any:
        width = 3.2 * min(len(cases), MOST_COLUMNS) + 0.5
        figure, axes = _figure(max(width, 5.5), 3.3, len(cases), sharey=True)
        for ax, case in zip(axes, cases, strict=True):
            for name in names:
                points = curves.get((name, case))
                if points:
                    lengths, values = zip(*points, strict=True)
                    found = summary.slope(lengths, values)
                    text = name if len(cases) > 1 or found is None else f"{name}, slope {found:.2f}"
                    ax.plot(lengths, values, label=text, **_style(names, name))
            ax.set_title(case)
            _length_axis(ax, sorted({length for points in curves.values() for length, _ in points}))
        axes[0].set_ylabel(label)
        handles, labels = _all_labels(axes)
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 3), frameon=False)
        return figure

    caption = f"{task}: {what} over the number of positions, both axes logarithmic."
    return Plot(f"{what}-{_slug(task)}", caption, draw, task)


def _length_axis(ax: Any, lengths: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    step = -(-len(lengths) // 5)
    ax.set_xticks(lengths[::step], [_short(length) for length in lengths[::step]])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("positions")


def _short(length: int) -> str:
    if length % (1 << 20) == 0:
        return f"{length >> 20}M"
    return f"{length >> 10}K" if length % 1024 == 0 else str(length)


# -- waste -------------------------------------------------------------------------------------------------------------


def _waste(run: Run) -> Plot:
    """At the longest length that both are known for."""
    longest = max((r.q_len for r in run.records if len(r.waste) > 1), default=max(r.q_len for r in run.records))
    records = list({r.case: r for r in run.records if r.q_len == longest}.values())
    names = list(dict.fromkeys(name for record in records for name in record.waste))

    def draw() -> Any:
        figure, (ax,) = _figure(max(6.5, 0.75 * len(records) + 1.5), 3.2)
        for n, name in enumerate(names):
            places = [at + (n - (len(names) - 1) / 2) * 0.38 for at in range(len(records))]
            bars = ax.bar(places, [r.waste.get(name, 0) for r in records], 0.36, label=name, color=COLORS[n])
            ax.bar_label(bars, fmt="%.3g", fontsize=7)
        _plain_log_axis(ax, "{:g}")
        ax.set_ylim(bottom=0.9)
        _case_axis(ax, [record.case for record in records])
        ax.set_ylabel("scores computed / non-zeros")
        figure.legend(*_all_labels([ax]), loc="outside upper center", ncols=3, frameon=False)
        return figure

    return Plot("waste", f"Waste at {longest:,} positions: scores computed for one non-zero; 1 is none.", draw)
