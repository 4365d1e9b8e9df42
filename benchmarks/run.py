"""Measure: `python -m benchmarks.run [--suite planning waste xla] [--quick] [--out DIR]`.

Prints a table per suite, with the bars that apply and whether they are met; `--out` keeps the raw samples as JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import rich.console

from benchmarks import peers
from benchmarks.report import Report, machine, write_json


def planning(given: argparse.Namespace) -> Iterator[Report]:
    """Text to printed plan, and create_block_mask beside it."""
    from benchmarks import planning as suite

    yield suite.run((1024,) if given.quick else (16384, 1 << 20), 3 if given.quick else 7)
    if given.flex:
        lengths = (1024,) if given.quick else (4096, 16384, *([32768] if given.flex_32768 else []))
        yield suite.run_flex(lengths, 1 if given.quick else 3)


def waste(given: argparse.Namespace) -> Iterator[Report]:
    """Tile area over non-zeros, beside FlexAttention's."""
    from benchmarks import waste as suite

    flex_len = 1024 if given.quick else 8192
    yield suite.run(1024 if given.quick else 16384, flex_len if given.flex else None)


def xla(given: argparse.Namespace) -> Iterator[Report]:
    """Speed and memory on this CPU, against dense masked attention."""
    from benchmarks import xla as suite

    yield suite.run(512 if given.quick else 4096, 3 if given.quick else 7)
    yield suite.run_long(2048 if given.quick else 65536, 2 if given.quick else 5)


SUITES: dict[str, Callable[[argparse.Namespace], Iterator[Report]]] = {
    "planning": planning,
    "waste": waste,
    "xla": xla,
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", nargs="+", choices=tuple(SUITES), default=list(SUITES), help="default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works; few bars apply")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the raw samples there, one JSON file a table")
    parser.add_argument("--no-flex", dest="flex", action="store_false", help="leave FlexAttention out")
    parser.add_argument("--flex-32768", action="store_true", help="create_block_mask at 32,768 too: it needs 20 GB")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a bar is missed")
    given = parser.parse_args(arguments)
    if given.flex and not peers.has_flex():
        print("torch is not installed: FlexAttention is left out (pip install torch)", file=sys.stderr)
        given.flex = False
    return given


def main(arguments: list[str] | None = None) -> int:
    """Runs the suites asked for; the process's exit code."""
    given = parse_arguments(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before a suite imports jax: these are measurements of the CPU
    console = rich.console.Console(width=None if sys.stdout.isatty() else 140)
    facts = machine()
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    console.print(f"{facts['cpu']}, {facts['threads']} threads; Python {facts['python']}, {versions}", style="dim")
    missed = False
    for name in dict.fromkeys(given.suite):
        for report in SUITES[name](given):
            console.print(report.table())
            missed |= bool(report.failed)
            if given.out:
                write_json(given.out / f"{report.name}.json", report.to_json())
    if given.out:
        console.print(f"raw samples: {given.out}")
    return int(missed and given.strict)


if __name__ == "__main__":
    sys.exit(main())
