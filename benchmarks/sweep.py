"""What generated kernels become, without a GPU: `python -m benchmarks.sweep --arch sm_90 --kernel forward ...`.

Compiles every combination of tile sizes, warps, stages and ways to read keys and values, each in a process of its own,
and prints registers, spills, shared memory, tensor-core instructions and the modelled cycles of one score, the best
first. It is how the configurations of `splat.planning.kernels` were found. For example, in half a minute:

    python -m benchmarks.sweep --arch sm_90 --head-dim 128 --sizes 128x128,128x64 --warps 8 --stages 2,3
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import rich.console

from benchmarks.report import Report, write_json
from splat.codegen.triton.offline import Compiled, Failure, Job, compile_all
from splat.codegen.triton.offline_model import ARCHITECTURES, cycles_per_tile, loop_instructions
from splat.planning.kernels import KERNELS

FACTORY = "splat.codegen.triton.record:sample"

#: Floating-point operations of a kernel's matrix products, by score and component of the head dim.
PRODUCT_FLOPS = dict(zip(KERNELS, (4, 6, 8), strict=True))

COLUMNS = (
    "tile", "warps", "stages", "reads", "registers", "spilled", "shared", "tensor cores", "copies", "s",
    "cycles/score", "masked", "verdict",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A combination and its outcome.

    Attributes:
      full, masked: modelled cycles per score of the shortest and the longest inner loop; None where there is none.
    """

    job: Job
    result: Compiled | Failure
    full: float | None
    masked: float | None
    problems: list[str]


def jobs(given: argparse.Namespace) -> Iterator[Job]:
    """Every combination asked for."""
    # Before Hopper, and on AMD, descriptors become pointers: a second way that is none.
    ways = [False, True] if given.arch in ("sm_90", "sm_100") else [False]
    if given.descriptors is not None:
        ways = [given.descriptors]
    for (q, kv), warps, stages, way in itertools.product(given.sizes, given.warps, given.stages, ways):
        yield Job(
            given.factory,
            dict(
                kernel=given.kernel, arch=given.arch, head_dim=given.head_dim, dtype=given.dtype, block_q=q,
                block_kv=kv, num_warps=warps, num_stages=stages, descriptors=way, pattern=given.pattern,
            ),
            given.arch,
            options=dict(given.option),
            jax=given.jax,
            name=f"{given.kernel} {q}x{kv} w{warps} s{stages} {'descriptors' if way else 'pointers'}",
        )  # fmt: skip


def judged(job: Job, result: Compiled | Failure, allowed_spill_bytes: int) -> Row:
    """A row of the table: what is wrong with a kernel, and what the model makes of its loops."""
    asked = job.arguments
    # Full float32 has no tensor cores on NVIDIA.
    problems = result.problems(allowed_spill_bytes, needs_tensor_core=asked["dtype"] != "float32")
    cycles = []
    if isinstance(result, Compiled):
        scores = asked["block_q"] * asked["block_kv"]
        flops = PRODUCT_FLOPS[asked["kernel"]] * scores * asked["head_dim"]
        for loop in loop_instructions(result) or ():
            tile = cycles_per_tile(loop, arch=job.arch, flops=flops, num_warps=result.num_warps, dtype=asked["dtype"])
            cycles.append(tile / scores)
    return Row(job, result, min(cycles, default=None), max(cycles, default=None), problems)


def report(rows: list[Row], title: str) -> Report:
    """The table, healthy kernels first, the fewest modelled cycles first."""
    table = Report("sweep", title, COLUMNS)
    for row in sorted(rows, key=lambda row: (bool(row.problems), row.full is None, row.full or 0.0)):
        asked, result = row.job.arguments, row.result
        cells = [f"{asked['block_q']}x{asked['block_kv']}", str(asked["num_warps"]), str(asked["num_stages"])]
        cells.append("descriptors" if asked["descriptors"] else "pointers")
        if isinstance(result, Compiled):
            counts = [" ".join(f"{n} {name}" for name, n in d.items()) for d in (result.tensor_core, result.copies)]
            cells += [str(result.registers), str(result.spilled_bytes), f"{result.shared_bytes:,}", *counts]
            verdict = _verdict(row, result)
            facts = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.repr}
        else:
            cells += [""] * 5
            verdict = f"FAIL {result.outcome.name.lower()}"
            facts = dict(outcome=result.outcome.name.lower(), message=result.message, seconds=result.seconds)
        cells += [f"{result.seconds:.1f}", *("" if c is None else f"{c:.4f}" for c in (row.full, row.masked)), verdict]
        model = dict(cycles_per_score=row.full, masked_cycles_per_score=row.masked)
        table.add(
            *cells, **{**facts, **asked}, **model, options=row.job.options, jax=row.job.jax, problems=row.problems
        )
    return table


def _verdict(row: Row, result: Compiled) -> str:
    """The cell that names what is wrong; `problems` in the JSON file says it in full."""
    if not row.problems:
        return "pass"
    signs = {
        "serialized": result.serialized,
        "shared": result.shared_bytes > ARCHITECTURES[result.arch].shared_limit,
        "spills": any(" spills " in problem for problem in row.problems),
        "no tensor core": any("no tensor-core" in problem for problem in row.problems),
    }
    return "FAIL " + ", ".join(name for name, sign in signs.items() if sign)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def sizes(text: str) -> list[tuple[int, int]]:
        pairs = [part.split("x") for part in text.split(",")]
        return [(int(q), int(kv)) for q, kv in pairs]

    def option(text: str) -> tuple[str, int | str]:
        name, _, value = text.partition("=")
        return name, int(value) if value.isdigit() else value

    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--arch", choices=tuple(ARCHITECTURES), required=True)
    add("--kernel", choices=KERNELS, default=KERNELS[0])
    add("--head-dim", type=int, default=128)
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--pattern", default="causal() & window(1024)", help="what the kernel is generated for (%(default)s)")
    add(
        "--sizes",
        type=sizes,
        default=sizes("128x128,128x64,64x128,64x64"),
        metavar="QxK,...",
        help="block_q x block_kv",
    )
    add("--warps", type=numbers, default=[4, 8], metavar="N,...")
    add("--stages", type=numbers, default=[2, 3], metavar="N,...")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--descriptors", dest="descriptors", action="store_true", default=None, help="TMA only")
    ways.add_argument("--pointers", dest="descriptors", action="store_false", help="no TMA; default: both where it is")
    add("--option", type=option, action="append", default=[], metavar="NAME=VALUE", help="of the compiler: maxnreg=168")
    add("--jax", action="store_true", help="specialise as jax-triton does: no scalar is known to be a multiple of 16")
    add("--allow-spill", type=int, default=0, metavar="BYTES", help="per thread, that are no failure")
    add("--workers", type=int, default=1, help="compilers at a time")
    add("--timeout", type=float, default=120.0, metavar="S", help="for one kernel")
    add("--factory", default=FACTORY, metavar="MODULE:FUNCTION", help="where launches are from (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="write every number there, as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Compiles, prints, and returns the exit code: 1 where no combination is healthy."""
    given = parse_arguments(arguments)
    console = rich.console.Console(width=None if sys.stdout.isatty() else 180)
    asked = list(jobs(given))
    with console.status(f"compiling {len(asked)} kernels") as status:
        done = itertools.count(1)

        def progress(job: Job, result: Compiled | Failure) -> None:
            status.update(f"{next(done)} of {len(asked)}: {job.name}, {result.seconds:.1f} s")

        results = compile_all(asked, workers=given.workers, timeout_s=given.timeout, progress=progress)
    rows = [judged(job, result, given.allow_spill) for job, result in zip(asked, results, strict=True)]
    triton = importlib.metadata.version("triton")
    table = report(rows, f"{given.kernel}, {given.arch}, head dim {given.head_dim}, {given.dtype}; Triton {triton}")
    shown = table.table()
    shown.caption = f"{sum(not row.problems for row in rows)} of {len(rows)} are healthy"
    console.print(shown)
    for row in rows:
        if isinstance(row.result, Failure):
            console.print(row.problems[0], markup=False, highlight=False)
    if given.out:
        write_json(given.out, {**table.to_json(), "triton": triton})
    return int(all(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
