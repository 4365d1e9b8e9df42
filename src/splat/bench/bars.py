"""What numbers have to reach, wherever a run has them: said beneath its tables, no failure of the run."""

from __future__ import annotations

from splat.bench import cases, summary
from splat.bench.record import Record, Run

#: positions -> milliseconds that expression to printed plan may take.
PLANNING_MS = {16384: 5.0, 1 << 20: 100.0}


def missed(run: Run) -> list[str]:
    """Each bar of SPLAT's first contender that is missed, in words; none in a rehearsal."""
    if run.settings["quick"]:
        return []
    return [
        f"{record.task}, {record.case}, {record.q_len:,}: {why}"
        for record in run.records
        if (why := _missed(run, record)) is not None
    ]


def _missed(run: Run, record: Record) -> str | None:
    first = summary.first_of(run, record.task)
    if first is None or first not in record.measured:
        return None
    if record.op == "planning":
        most, took = PLANNING_MS.get(record.q_len), record.measured[first].median_ms
        return None if most is None or took <= most else f"{took:.3g} ms, {most:g} are allowed"
    case = next((one for one in cases.of(record.suite) if one.name == record.case), None)
    least, faster = case and case.bar("speedup", record.q_len), summary.faster(run, record, "dense")
    if record.task != "attention" or not least or faster is None or faster >= least:
        return None
    return f"{faster:.3g} times faster than dense, {least:g} are wanted"
