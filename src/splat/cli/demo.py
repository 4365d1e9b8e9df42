"""`splat demo`: attention over real text by three patterns, checked against the truth, timed against dense attention.

The checks do not use SPLAT's analysis: each pattern comes with its predicate, written out in NumPy, from which the
dense masks are made.
"""

from __future__ import annotations

import dataclasses
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from splat.cli.errors import check_out
from splat.errors import ArgumentError
from splat.files import replacing

NAME = "demo"

NUM_HEADS, HEAD_DIM, WIDTH, POSITIONAL = 8, 64, 512, 16
#: Rows that are checked against the float64 oracle, and how far off a value may be, by platform: a GPU multiplies
#: float32 in pieces of lower precision.
CHECKED_ROWS, TOLERANCE, GPU_TOLERANCE = 1024, 2e-5, 2e-3
#: Measuring goes on for about this long, at most so many rounds; dense attention runs as often as fits, at least once.
BUDGET_S, MAX_ROUNDS, RUNS_A_ROUND = 40.0, 5, 3
#: Bytes of scores that dense attention forms at once.
DENSE_BYTES, GPU_DENSE_BYTES = 128 << 20, 2 << 30

Predicate = Callable[[np.ndarray, np.ndarray], np.ndarray]

CASES: tuple[tuple[str, Predicate], ...] = (
    ("window(256)", lambda i, j: abs(i - j) <= 256),
    ("window(128) | strided(128)", lambda i, j: (abs(i - j) <= 128) | (i % 128 == j % 128)),
    ("window(128) | global_tokens(16)", lambda i, j: (abs(i - j) <= 128) | (i < 16) | (j < 16)),
)


@dataclasses.dataclass
class Case:
    """One pattern: its plan, its mask, the compiled functions, and what was found."""

    text: str
    plan: Any
    mask: np.ndarray
    sparse: Callable[[], Any] | None = None
    dense: Callable[[], Any] | None = None
    sparse_ms: list[float] = dataclasses.field(default_factory=list)
    dense_ms: list[float] = dataclasses.field(default_factory=list)
    error: float = float("nan")  # to the oracle
    dense_difference: float | None = None  # where dense attention has run


def command(
    q_len: Annotated[int, typer.Option(min=512, max=32768, help="Positions.")] = 16384,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("splat-demo.png"),
) -> None:
    """Run three patterns over real text: plan, compute, check against float64, time against dense attention."""
    check_out(out, picture=True)
    import jax
    from rich.console import Console

    from splat.explain import save_strip

    console, began = Console(), time.perf_counter()
    text = read_text(q_len)
    on_cpu = jax.default_backend() == "cpu"
    device = jax.devices()[0]
    where = "cpu" if on_cpu else f"{device.platform}, {device.device_kind}"
    console.print(
        f"{q_len:,} bytes of Python's standard library, {NUM_HEADS} heads of {HEAD_DIM}, float32, on {where}\n",
        markup=False,
        highlight=False,
    )
    with _progress(console) as step:
        step("embedding the text and making the masks")
        arrays = tuple(map(jax.numpy.asarray, embed(text)))
        cases = [_case(pattern, keep, q_len) for pattern, keep in CASES]
        for case in cases:
            console.print(f"{case.plan}\n", highlight=False, markup=False, soft_wrap=True)
        block = dense_block(q_len, DENSE_BYTES if on_cpu else GPU_DENSE_BYTES)
        _compile(cases, arrays, block, step)
        rows = check(cases, arrays, step)
        measure(cases, step)
    tolerance = TOLERANCE if on_cpu else GPU_TOLERANCE
    console.print(_table(cases))
    console.print(_small_print(cases, rows, block, q_len, tolerance), highlight=False, markup=False)
    sparse_ms, dense_ms = medians_ms(cases)
    times_ms = {"SPLAT": sparse_ms, "dense JAX": [dense_ms] * len(cases)}
    with replacing(out) as written:
        save_strip([case.plan for case in cases], written, zoom=True, times_ms=times_ms)
    took = f"\npicture: {out}    ({time.perf_counter() - began:.0f} s in all)"
    console.print(took, markup=False, highlight=False, soft_wrap=True)
    wrong = [case.text for case in cases if not np.max([case.error, case.dense_difference or 0.0]) <= tolerance]
    if wrong:
        typer.secho(f"error: wrong results, off by more than {tolerance:g}: {'; '.join(wrong)}", fg="red", err=True)
        raise typer.Exit(1)


# -- input -------------------------------------------------------------------------------------------------------------


def read_text(length: int) -> np.ndarray:
    """The first `length` bytes of the standard library's modules in the order of their names; uint8."""
    folder = Path(sysconfig.get_path("stdlib"))
    pieces, total = [], 0
    for path in sorted(folder.glob("*.py")):
        if total >= length:
            break
        pieces.append(path.read_bytes())
        total += len(pieces[-1])
    if not total:
        raise ArgumentError(f"the demo reads Python's standard library, but {folder} has no source files")
    return np.resize(np.frombuffer(b"".join(pieces), np.uint8), length)


def embed(text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """query, key and value, float32 [1, T, N, H]: random byte embedding and sinusoids, projected; always the same."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(256, WIDTH)).astype(np.float32)
    angle = np.arange(text.size)[:, None] / 32 ** (np.arange(POSITIONAL // 2) / 2)
    features = np.concatenate([table[text], np.sin(angle), np.cos(angle)], axis=1, dtype=np.float32)
    projected = []
    for _ in range(3):
        weights = rng.normal(size=(features.shape[1], NUM_HEADS * HEAD_DIM), scale=WIDTH**-0.5)
        projected.append((features @ weights.astype(np.float32)).reshape(1, text.size, NUM_HEADS, HEAD_DIM))
    query, key, value = projected
    return query, key, value


def _case(text: str, keep: Predicate, length: int) -> Case:
    import splat
    from splat.codegen.devices import device_target

    plan = splat.plan(text, length, head_dim=HEAD_DIM, num_q_heads=NUM_HEADS, target=device_target())
    mask = np.empty((length, length), bool)
    j = np.arange(length, dtype=np.int32)[None, :]
    for first in range(0, length, 512):
        i = np.arange(first, min(first + 512, length), dtype=np.int32)[:, None]
        mask[first : first + 512] = keep(i, j)
    return Case(text, plan, mask)


# -- what is run -------------------------------------------------------------------------------------------------------


def dense_block(length: int, limit: int) -> int:
    """How many queries dense attention takes at once, so that their float32 scores stay below `limit` bytes."""
    fits = max(limit // (4 * NUM_HEADS * length), 1)
    return length if fits >= length else 1 << (fits.bit_length() - 1)


def dense_attention(query: Any, key: Any, value: Any, mask: Any, block: int) -> Any:
    """JAX's own attention with a mask, exact, `block` queries at a time."""
    import jax
    import jax.numpy as jnp

    length = query.shape[1]
    if block >= length:
        return jax.nn.dot_product_attention(query, key, value, mask=mask[None, None])
    parts = -(-length // block)
    missing = parts * block - length
    queries = jnp.pad(query[0], ((0, missing), (0, 0), (0, 0))).reshape(parts, 1, block, *query.shape[2:])
    masks = jnp.pad(mask, ((0, missing), (0, 0))).reshape(parts, 1, 1, block, length)
    out = jax.lax.map(lambda one: jax.nn.dot_product_attention(one[0], key, value, mask=one[1]), (queries, masks))
    return out.reshape(1, parts * block, *query.shape[2:])[:, :length]


def _compile(cases: list[Case], arrays: tuple[Any, ...], block: int, step: Callable[[str], None]) -> None:
    """Fills in `sparse` and `dense`: both compiled, both ending when their result is there."""
    import jax

    import splat

    step("compiling dense attention")
    mask = jax.ShapeDtypeStruct(cases[0].mask.shape, bool)
    dense = jax.jit(lambda q, k, v, m: dense_attention(q, k, v, m, block)).lower(*arrays, mask).compile()
    for case in cases:
        step(f"compiling {case.text}")
        pattern = case.plan.problem.pattern
        sparse = jax.jit(lambda q, k, v, p=pattern: splat.attention(q, k, v, p)).lower(*arrays).compile()
        on_device = jax.numpy.asarray(case.mask)
        case.sparse = lambda run=sparse: run(*arrays).block_until_ready()
        case.dense = lambda m=on_device: dense(*arrays, m).block_until_ready()


def check(cases: list[Case], arrays: tuple[Any, ...], step: Callable[[str], None]) -> np.ndarray:
    """Fills in `error`, from the float64 oracle on a sample of rows and all heads; returns these rows."""
    from splat.reference import attention

    query, key, value = (np.asarray(x, np.float64) for x in arrays)
    length = query.shape[1]
    edges = np.r_[:32, length - 32 : length]
    inner = np.random.default_rng(1).permutation(np.arange(32, length - 32))[: CHECKED_ROWS - edges.size]
    rows = np.sort(np.r_[edges, inner])
    for case in cases:
        step(f"checking {case.text} against the float64 oracle")
        assert case.sparse is not None
        found = np.asarray(case.sparse(), np.float64)
        case.error = 0.0
        for first in range(0, rows.size, 128):
            at = rows[first : first + 128]
            truth, _ = attention(query[:, at], key, value, case.mask[at])
            case.error = float(np.maximum(case.error, np.abs(found[:, at] - truth).max()))  # NaN stays NaN
    return rows


def measure(cases: list[Case], step: Callable[[str], None]) -> None:
    """Fills in the times, interleaved: in every round each pattern runs sparse and dense. Compares their results."""
    began, longest = time.perf_counter(), 0.0

    def fits(more_s: float) -> bool:
        return time.perf_counter() - began + more_s <= BUDGET_S

    for round_ in range(MAX_ROUNDS):
        if round_ and not fits(longest * len(cases)):
            break
        for case in cases:
            assert case.sparse is not None
            assert case.dense is not None
            step(f"timing {case.text}, round {round_ + 1}")
            found = [_timed(case.sparse, case.sparse_ms) for _ in range(RUNS_A_ROUND)]
            if longest and not fits(longest):
                continue  # on a slow or busy machine; one dense time serves all masks
            step(f"timing dense attention, round {round_ + 1}")
            expected = _timed(case.dense, case.dense_ms)
            longest = max(longest, 1e-3 * case.dense_ms[-1])
            if case.dense_difference is None:
                case.dense_difference = float(np.abs(np.asarray(found[0]) - np.asarray(expected)).max())


def _timed(run: Callable[[], Any], times_ms: list[float]) -> Any:
    began = time.perf_counter()
    result = run()
    times_ms.append(1e3 * (time.perf_counter() - began))
    return result


# -- what is said ------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(console: Any) -> Iterator[Callable[[str], None]]:
    """A function to say what is being done: a line that is replaced on a terminal, lines elsewhere."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        yield lambda text: console.print(f"... {text}", highlight=False, markup=False)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("", total=None)
        yield lambda text: progress.update(task, description=text)


def medians_ms(cases: list[Case]) -> tuple[list[float], float]:
    """SPLAT's median for every pattern, and dense attention's over all: its work does not depend on the mask."""
    return [float(np.median(c.sparse_ms)) for c in cases], float(np.median([ms for c in cases for ms in c.dense_ms]))


def _table(cases: list[Case]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("pattern", min_width=18)
    for name in ("density", "waste", "SPLAT ms", "dense ms", "speed-up", "max error"):
        table.add_column(name, justify="right", no_wrap=True)
    each, dense = medians_ms(cases)
    for case, sparse in zip(cases, each, strict=True):
        table.add_row(
            case.text, f"{case.plan.density:.2%}", f"{case.plan.waste:.2f}", f"{sparse:,.1f}", f"{dense:,.1f}",
            f"{dense / sparse:.1f}x", f"{case.error:.1e}",
        )  # fmt: skip
    return table


def _small_print(cases: list[Case], rows: np.ndarray, block: int, length: int, tolerance: float) -> str:
    how = "in one piece"
    if block < length:
        scores = 4e-9 * NUM_HEADS * length**2
        how = f"{block} queries at a time (exact; all scores at once would be {scores:.1f} GB)"
    dense_runs = sum(len(case.dense_ms) for case in cases)
    differences = [case.dense_difference for case in cases if case.dense_difference is not None]
    return (
        f"\nSPLAT: implementation {cases[0].plan.implementation}, median of {len(cases[0].sparse_ms)} runs each. "
        f"Dense: jax.nn.dot_product_attention with the pattern's mask, {how}; median of {dense_runs} runs over all "
        f"masks, between SPLAT's runs. Max error: from a float64 oracle on {rows.size:,} of {length:,} rows (both ends "
        f"and a random sample), all {NUM_HEADS} heads. Largest difference from dense JAX, all rows and heads of "
        f"{len(differences)} patterns: {np.max(differences):.1e}. Both may be {tolerance:g} at most."
    )
