"""`splat bench`: measure SPLAT against its peers, check first, keep everything, write a report."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splat.errors import ArgumentError
from splat.files import replacing

if TYPE_CHECKING:
    from rich.console import Console

    from splat.bench.baseline import Comparison
    from splat.bench.record import Run
    from splat.bench.run import Request

NAME = "bench"


def command(
    suite: Annotated[
        str,
        typer.Argument(help="paper, sas, models, figures, planning, vocabulary, scaling or ablation.", metavar="SUITE"),
    ],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    against: Annotated[
        list[str] | None, typer.Option(help="A peer; repeat for more. All that are installed where not given; or none.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it works.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="A folder for SUITE.json (raw samples) and SUITE.html; results there are kept.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="An earlier SUITE.json: exit with 1 if SPLAT is slower.")
    ] = None,
    op: Annotated[
        list[str] | None, typer.Option(help="sddmm, softmax, spmm, composed, attention, training or planning; repeat.")
    ] = None,
    q_len: Annotated[list[int] | None, typer.Option(help="Positions; repeat for more.", min=16)] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32 or bfloat16; repeat for both. float32 where not given.")
    ] = None,
    case: Annotated[list[str] | None, typer.Option(help="A case of the suite by name; repeat for more.")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads.", min=1)] = None,
    head_dim: Annotated[int | None, typer.Option(help="Head dimension.", min=1)] = None,
    implementation: Annotated[
        list[str] | None, typer.Option(help="Of SPLAT; repeat for more. The best that can serve where not given.")
    ] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="SPLAT's own variants instead of peers.")] = False,
    threads: Annotated[int, typer.Option(help="Processors that everyone may use, on a CPU.", min=1)] = 2,
) -> None:
    """Measure SPLAT against its peers: correctness first, then times in turns, memory, and a report."""
    import dataclasses

    from rich.console import Console

    from splat.bench import baseline as baselines
    from splat.bench import record, run, suites

    found = suites.find(suite)
    if device not in ("cpu", "cuda"):
        raise ArgumentError(f"--device must be cpu or cuda, but {device!r} was given")
    before = None if baseline is None else record.read(baseline)
    if out is not None:
        _check_kept(out / f"{found.name}.json")
        out.mkdir(parents=True, exist_ok=True)
    request = run.Request(
        dataclasses.replace(found, ablation=found.ablation or ablate),
        suites.Selection(
            _words(op), tuple(q_len or ()), tuple(case or ()), _words(dtype), heads, head_dim, device, quick
        ),
        _words(against),
        _words(implementation),
        threads,
        shlex.join(["splat", *sys.argv[1:]]),
    )
    if before is not None:
        _check_baseline(before, request)
    # A file is as wide as the tables, a terminal as it is.
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200)
    with run.prepared(request):
        made = _measured(request, out, Console(stderr=True))
    comparison = None if before is None else baselines.compare(before, made)
    _print(console, made, comparison)
    if out is not None:
        _write_report(console, out, made, comparison)
    if made.failed or (comparison is not None and comparison.regressions):
        raise typer.Exit(1)


def _words(given: list[str] | None) -> tuple[str, ...]:
    """`--against a --against b` and `--against a,b` alike."""
    return tuple(word for one in given or () for word in one.replace(",", " ").split())


def _measured(request: Request, out: Path | None, console: Console) -> Run:
    """Everything, with a progress bar, or a line each in a file; the raw samples are written after every record."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from splat.bench import machine, run

    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)

        def listen(made: Run, total: int) -> None:
            done = len(made.records) + len(made.failed)
            progress.update(task, completed=done, total=total)
            if not console.is_terminal:
                console.print(f"{done}/{total}", highlight=False)
            if out is not None:
                machine.write_json(out / f"{made.suite}.json", made.to_json())

        def tell(text: str) -> None:
            progress.update(task, description=text)

        return run.run(request, tell=tell, listen=listen)


def _check_kept(path: Path) -> None:
    """Raises ArgumentError where an earlier run's results would be lost."""
    if path.exists():
        raise ArgumentError(
            f"--out must be a folder without results of this suite, but {path} exists. Give another folder, or remove "
            "that file."
        )


def _check_baseline(before: Run, request: Request) -> None:
    """Raises ArgumentError where nothing can be compared: said before the work, not after it."""
    from splat.bench import suites

    conditions: dict[str, object] = {"device": request.selection.device}
    if request.selection.device == "cpu":
        conditions["threads"] = request.threads
    for name, now in conditions.items():
        then = before.settings.get(name)
        if then != now:
            raise ArgumentError(
                f"--baseline must be of the same {name}, but it is of {then} and this run of {now}. "
                f"Give --{name} {then}, or another baseline."
            )
    asked = {problem.key for problem in suites.problems(request.suite, request.selection)}
    if not asked & {record.key for record in before.records}:
        raise ArgumentError(
            f"--baseline has no problem in common with this run: it is of the suite {before.suite}. Measure the same "
            "suite, operations, dtypes and sizes, --quick or not."
        )


def _print(console: Console, made: Run, comparison: Comparison | None) -> None:
    from splat.bench import tables

    for task in made.tasks:
        console.print(tables.speedups(made, task).draw())
        slopes = tables.slopes(made, task)
        if slopes is not None:
            console.print(slopes.draw())
    if comparison is not None:
        console.print(tables.comparison(comparison).draw())
        if comparison.other_machine:
            console.print(f"the baseline is of another processor: {comparison.other_machine}", markup=False)
        for change in comparison.regressions:
            console.print(str(change), style="red", markup=False, highlight=False)
    for note in tables.notes(made):
        console.print(
            note, style="red" if note.startswith(("BAR MISSED", "FAILED")) else "dim", markup=False, highlight=False
        )


def _write_report(console: Console, out: Path, made: Run, comparison: Comparison | None) -> None:
    from splat.bench.report import report

    page = out / f"{made.suite}.html"
    with replacing(page) as written:
        written.write_text(report(made, comparison), encoding="utf-8")
    kept = f"report: {page}; raw samples: {out / f'{made.suite}.json'}"
    console.print(kept, markup=False, highlight=False, soft_wrap=True)
