"""A run as tables: plain cells, which the terminal and the report draw each in its own way."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from splat.bench import bars, summary
from splat.bench.baseline import Comparison
from splat.bench.record import Measured, Record, Run

if TYPE_CHECKING:
    from rich.table import Table as RichTable

#: Columns that begin every table of results: the problem.
PROBLEM_COLUMNS = ("pattern", "positions", "density")


@dataclasses.dataclass(frozen=True)
class Table:
    """Headings and rows of text; `bold` are the rows that sum up."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bold: frozenset[int] = frozenset()

    def draw(self) -> RichTable:
        import rich.box
        import rich.table
        from rich.markup import escape

        table = rich.table.Table(title=self.title, box=rich.box.SIMPLE_HEAD, title_justify="left")
        for n, column in enumerate(self.columns):
            table.add_column(column, justify="left" if n == 0 else "right", no_wrap=True, overflow="fold")
        for n, row in enumerate(self.rows):
            table.add_row(*map(escape, row), style="bold" if n in self.bold else None)
        return table


def spread(measured: Measured) -> str:
    """ "1.23 ±4%": the median, and half the distance between the quartiles."""
    low, high = measured.quartiles_ms
    return f"{measured.median_ms:.3g} ±{(high - low) / 2 / measured.median_ms:.0%}"


def megabytes(size: float | None) -> str:
    """Below one the system's own count is too coarse."""
    return "unknown" if size is None else "< 1" if size < 1e6 else f"{size / 1e6:,.1f}"


def speedups(run: Run, task: str) -> Table:
    """SPLAT's numbers, and how many times faster it is than everyone else."""
    first, rivals = summary.first_of(run, task), summary.rivals(run, task)
    records = [record for record in run.of_task(task) if first in record.measured]
    rated = any(record.flops for record in records)
    rate_columns = ("GFLOP/s", "of peak") if rated else ()
    rows = []
    for record in records:
        assert first is not None, "records of it were found"
        ours = record.measured[first]
        rate = record.flops_per_s(first) or 0.0
        rates = (f"{rate / 1e9:.1f}", f"{rate / run.peak_flops_per_s(record.dtype):.0%}") if rated else ()
        found = [summary.faster(run, record, rival) for rival in rivals]
        rows.append(
            (*_problem(record), spread(ours), *rates, f"{ours.first_ms / 1e3:.2f}", megabytes(ours.peak_bytes),
             *("" if value is None else f"{value:.2f}x" for value in found), record.clean)
        )  # fmt: skip
    means = [summary.geomean(run, task, rival) for rival in rivals]
    columns = (*PROBLEM_COLUMNS, f"{first}\nms", *rate_columns, "first s", "peak MB",
               *(f"over\n{summary.short(rival, first)}" for rival in rivals), "clean")  # fmt: skip
    bold: frozenset[int] = frozenset()
    if len(rows) > 1 and rivals:
        bold = frozenset({len(rows)})
        blank = [""] * (len(columns) - len(rivals) - 2)
        rows.append(("geometric mean", *blank, *("" if mean is None else f"{mean[0]:.2f}x" for mean in means), ""))
    return Table(_title(run, task), columns, tuple(rows), bold)


def everyone(run: Run, task: str) -> Table:
    """Median and spread of every contender, and what it needs before its first result."""
    rows = [
        (*_problem(record), name, spread(one), f"{one.prepare_ms / 1e3:.2f}", f"{one.first_ms / 1e3:.2f}",
         megabytes(one.peak_bytes), "" if one.off is None else f"{one.off:.0e}", one.note)
        for record in run.of_task(task)
        for name, one in record.measured.items()
    ]  # fmt: skip
    columns = (*PROBLEM_COLUMNS, "who", "ms", "prepare s", "first s", "peak MB", "error", "note")
    return Table(f"{task}: everyone's numbers", columns, tuple(rows))


def slopes(run: Run, task: str) -> Table | None:
    """How time and memory grow with the length; None where there is one length only."""
    found = {
        "time": summary.curves(run, task, summary.time_ms),
        "memory": summary.curves(run, task, summary.memory_bytes),
    }
    rows = []
    for (name, case), points in found["time"].items():
        cells = [f"{points[0][0]:,} to {points[-1][0]:,}"]
        for what in found.values():
            lengths, values = zip(*what.get((name, case), [(1, 1.0)]), strict=True)
            half = len(lengths) // 2
            for part in (slice(None), slice(half, None)):
                slope = summary.slope(lengths[part], values[part])
                cells.append("" if slope is None else f"{slope:.2f}")
        rows.append((case, name, *cells))
    if not rows:
        return None
    columns = ("pattern", "who", "positions", "time", "time, upper half", "memory", "memory, upper half")
    return Table(f"{task}: slope of log over log of the length (1 is linear, 2 quadratic)", columns, tuple(rows))


def structure(run: Run) -> Table:
    """Waste and metadata of every pattern."""
    one_each = {(record.case, record.q_len): record for record in run.records}
    names = list(dict.fromkeys(name for record in one_each.values() for name in record.waste))
    rows = [
        (*_problem(record), f"{record.nnz:,}", *(f"{record.waste[n]:.2f}" if n in record.waste else "" for n in names),
         f"{record.metadata_bytes:,}", f"{record.csr_bytes:,}", f"{record.metadata_bytes / record.csr_bytes:.2%}")
        for record in one_each.values()
    ]  # fmt: skip
    columns = (*PROBLEM_COLUMNS, "non-zeros", *(f"waste, {name}" for name in names), "ACSR bytes", "CSR bytes", "share")
    return Table("Waste (scores computed over non-zeros), and bytes of metadata", columns, tuple(rows))


def comparison(found: Comparison) -> Table:
    """This run beside the baseline, the worst first."""
    changes = sorted(found.changes, key=lambda change: -change.ratio)
    rows = tuple(
        (change.what, change.contender, f"{change.before_ms:.4g}", f"{change.now_ms:.4g}", f"{change.ratio:.2f}",
         f"{change.noise:.0%}", "SLOWER" if change.slower else "faster" if change.faster else "")
        for change in changes
    )  # fmt: skip
    columns = ("problem", "who", "before ms", "now ms", "now/before", "noise", "")
    return Table("Against the baseline", columns, rows, frozenset(n for n, one in enumerate(changes) if one.slower))


def notes(run: Run) -> list[str]:
    """What a reader has to know: who was left out, what failed, how disturbed the machine was."""
    out = [f"{name} took no part: {why}" for name, why in run.missing.items()]
    for name in run.contenders:
        reasons: dict[str, list[str]] = {}
        for record in run.records:
            if name in record.left_out:
                reasons.setdefault(record.left_out[name], []).append(f"{record.task} {record.case} {record.q_len:,}")
        out += [f"{name} was left out of {_some(where)}: {why}" for why, where in reasons.items()]
    if run.records:
        foreign = statistics.median(record.foreign for record in run.records)
        peaks = ", ".join(f"{peak / 1e9:.0f} GFLOP/s {dtype}" for dtype, peak in run.peaks.items())
        out.append(f"others took {foreign:.0%} of the processors (median); best matrix product {peaks}")
    return [*out, *(f"BAR MISSED: {what}" for what in bars.missed(run)), *(f"FAILED: {what}" for what in run.failed)]


def _some(where: Sequence[str]) -> str:
    return "; ".join(where) if len(where) <= 3 else f"{len(where)} cases ({where[0]}, ...)"


def _problem(record: Record) -> tuple[str, ...]:
    return (
        record.case,
        f"{record.q_len:,}",
        f"{record.density:.1%}" if record.density >= 0.01 else f"{record.density:.2%}",
    )


def _title(run: Run, task: str) -> str:
    if task == "planning":
        return "planning: expression to printed plan"
    record = run.of_task(task)[0]
    heads = f"{record.heads} head{'s' if record.heads != 1 else ''} of {record.head_dim}"
    return f"{record.op}: {record.dtype}, batch 1, {heads}, {run.settings['threads']} threads"
