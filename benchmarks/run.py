"""Measure: `python -m benchmarks.run [--suite waste cpu] [--quick] [--out DIR]`.

Prints a table per suite, with the bars that apply and whether they are met; `--out` keeps the raw samples as JSON.
`cpu` (generated C++ against its peers) takes about 40 minutes, and is measured when it is named.

With `--device cuda`, the suites of the GPU: sas, models, paper (attention against FlexAttention and dense attention),
planning (preparing patterns), tune (every configuration of every kernel). `--device cpu --quick` rehearses them without
a GPU, `--device model` predicts.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import rich.console

from benchmarks import peers
from benchmarks.cpu import NAMES as CPU_BARS
from benchmarks.report import Report, machine, write_json


def waste(given: argparse.Namespace) -> Iterator[Report]:
    """Tile area over non-zeros, beside FlexAttention's."""
    from benchmarks import waste as suite

    flex_len = 1024 if given.quick else 8192
    yield suite.run(1024 if given.quick else 16384, flex_len if given.flex else None)


def cpu(given: argparse.Namespace) -> Iterator[Report]:
    """Generated C++ on this CPU, against its peers."""
    from benchmarks.cpu import main as suite

    yield from suite.run(given)


SUITES: dict[str, Callable[[argparse.Namespace], Iterator[Report]]] = {
    "waste": waste,
    "cpu": cpu,
}

#: With --device; "planning" is short for "gpu-planning".
DEVICE_SUITES = ("sas", "planning", "gpu-planning", "models", "paper", "tune")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--suite", nargs="+", choices=(*SUITES, *DEVICE_SUITES), help="default: waste, or sas on a device")
    add("--quick", action="store_true", help="small sizes, to see that it works; few bars apply")
    add("--out", type=Path, metavar="DIR", help="write the raw samples there, as JSON")
    add("--no-flex", dest="flex", action="store_false", help="leave FlexAttention out")
    add("--strict", action="store_true", help="exit with 1 where a bar is missed")
    add("--only", nargs="+", choices=CPU_BARS, metavar="NAME", help=f"of the suite cpu: {', '.join(CPU_BARS)}")
    device = parser.add_argument_group("GPU suites (--cases and --lengths: cpu, too)")
    add = device.add_argument
    add("--device", choices=("cuda", "cpu", "model"), help="cpu: a rehearsal, with --quick; model: predictions")
    add("--minutes", type=float, default=9.0, help="for everything; what does not fit is left out, and named (9)")
    add("--cases", nargs="+", default=[], metavar="NAME", help='only these patterns, such as "sliding window"')
    add("--lengths", nargs="+", type=int, default=[], metavar="N", help="positions, the most important first")
    add("--no-jax", dest="jax", action="store_false", help="leave JAX out: its binding's check, cuDNN")
    add(
        "--jobs", type=int, metavar="N", help="processes that compile at a time (default: the machine's threads less 2)"
    )
    add("--configs", type=Path, metavar="FILE", help="tune: configurations by kernel instead of the built-in ones")
    add("--show", type=Path, metavar="FILE", help="print the tables of a file that --out wrote; measures nothing")
    given = parser.parse_args(arguments)
    _check(parser, given)
    if given.flex and given.device is None and not given.show and not peers.has_flex():
        print("torch is not installed: FlexAttention is left out (pip install torch)", file=sys.stderr)
        given.flex = False
    return given


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if given.suite is None:
        given.suite = ["waste"] if given.device is None else ["sas"]
    if given.device is None:
        foreign = [name for name in given.suite if name not in SUITES]
        if foreign:
            parser.error(
                f"{', '.join(foreign)}: add --device cuda, or --device model for predictions; splat bench measures here"
            )
        if given.only and "cpu" not in given.suite:
            parser.error("--only names bars of the suite cpu: add --suite cpu")
        return
    given.suite = ["gpu-planning" if name == "planning" else name for name in given.suite]
    foreign = [name for name in given.suite if name not in DEVICE_SUITES]
    if foreign:
        parser.error(f"{', '.join(foreign)}: this is measured on the host; leave --device out")
    if given.device == "cpu" and not given.quick:
        parser.error("--device cpu is a rehearsal with an interpreter, whose numbers mean nothing: add --quick")
    if given.device == "model" and set(given.suite) & {"gpu-planning", "tune"}:
        parser.error("the model knows attention only: --suite sas models paper")


def reports(given: argparse.Namespace) -> Iterator[Report]:
    """The tables asked for, as they are made."""
    if given.show:
        from benchmarks.gpu import main as device

        yield from device.kept(given.show)
    elif given.device == "model":
        from benchmarks.gpu import model

        yield from model.run(given.suite, tuple(given.lengths) or ((1024,) if given.quick else (8192, 16384)))
    elif given.device:
        from benchmarks.gpu import main as device

        yield from device.run(given, given.suite)
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before a suite imports jax: these are measurements of the CPU
        for name in dict.fromkeys(given.suite):
            for report in SUITES[name](given):
                yield report
                if given.out:
                    write_json(given.out / f"{report.name}.json", report.to_json())


def main(arguments: list[str] | None = None) -> int:
    """Runs the suites asked for; the process's exit code."""
    given = parse_arguments(arguments)
    wide = given.device or given.show or "cpu" in given.suite
    console = rich.console.Console(width=None if sys.stdout.isatty() else 180 if wide else 140)
    if not given.show:
        facts = machine()
        versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
        gpu = f"; {facts['gpu']['name']}, driver {facts['gpu']['driver']}" if facts["gpu"] else ""
        console.print(
            f"{facts['cpu']}, {facts['threads']} threads{gpu}; Python {facts['python']}, {versions}", style="dim"
        )
    missed = False
    for report in reports(given):
        console.print(report.table())
        missed |= bool(report.failed)
    if given.out:
        console.print(f"raw samples: {given.out}")
    return int(missed and given.strict)


if __name__ == "__main__":
    sys.exit(main())
