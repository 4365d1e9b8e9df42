"""One record: everyone prepared, checked, warmed up, then timed in turns."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import splat
from splat.acsr import ACSR
from splat.bench import gate, memory
from splat.bench.clock import LEAST_ROUNDS, TURN_MS, Turns, take_turns
from splat.bench.peers.base import BLAS_REST_S, Contender, Kind, Layout, Ready
from splat.bench.peers.ours import jitted
from splat.bench.problem import Problem
from splat.bench.record import Measured, Record
from splat.bench.timing import Enqueued, row, wall_ms
from splat.bench.truth import Truth
from splat.errors import UnsupportedError

#: Says what is being done.
Tell = Callable[[str], None]

#: Of the memory that is available, the share that one contender may need.
MEMORY_SHARE = 0.6

#: The tile of block masks whose waste is stated beside ours, and the longest sequence it is counted for.
BLOCK, BLOCKS_LONGEST = 128, 1 << 18

#: The matrix product that shares of the peak are stated of, and how often it is measured beside each record.
MATMUL, MATMUL_CALLS = 1536, 3

#: On a GPU, where smaller ones show the launch.
CUDA_MATMUL = 8192


@dataclasses.dataclass(frozen=True)
class Thoroughness:
    """How long to measure.

    Attributes:
      rounds: of turns, at least as many clean ones where the budget allows.
      budget_s: of one record's turns; slow contenders have as much again, each.
      turn_ms: what a turn's calls last together, at least.
      matmul: side of the matrix product.
    """

    rounds: int = 11
    budget_s: float = 8.0
    turn_ms: float = TURN_MS
    matmul: int = MATMUL


QUICK = Thoroughness(rounds=2, budget_s=0.2, turn_ms=0.0, matmul=256)


def thoroughness(device: str, quick: bool) -> Thoroughness:
    """Where nothing else is asked for."""
    how = QUICK if quick else Thoroughness()
    return dataclasses.replace(how, matmul=CUDA_MATMUL) if device == "cuda" else how


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A contender that has been called, and what that took."""

    contender: Contender
    ready: Ready
    prepare_ms: float
    first_ms: float
    warm_ms: float
    peak_bytes: int | None
    off: float | None


def measure(problem: Problem, contenders: Sequence[Contender], how: Thoroughness, tell: Tell) -> Record:
    """Everyone's numbers for one problem. Raises WrongError where SPLAT computes something else; peers are left out."""
    prepared: dict[str, _Prepared] = {}
    left_out: dict[str, str] = {}
    gate_off = None
    truth = Truth.sampled(problem)
    for contender in contenders:
        if problem.op not in contender.make:
            continue
        reason = contender.refuses(problem) or _too_large(problem, contender)
        if reason:
            left_out[contender.name] = reason
            continue
        tell(f"{problem}: preparing {contender.name}")
        try:
            ready = _prepare(truth, contender)  # before the gate: its first call is to be the first one
            if contender.kind in (Kind.OURS, Kind.VARIANT):
                gate_off = max(gate_off or 0.0, gate.check_small(problem, contender))
            prepared[contender.name] = ready
        except Exception as error:  # whatever a peer raises; a run goes on without it
            unserved = contender.kind is Kind.VARIANT and isinstance(error, UnsupportedError)
            if contender.kind is Kind.OURS or (contender.kind is Kind.VARIANT and not unserved):
                raise
            left_out[contender.name] = brief(error)
    tell(f"{problem}: timing {', '.join(prepared)}")
    turns = _timed(prepared, how)
    return _record(problem, prepared, left_out, gate_off, turns, how)


def brief(error: Exception) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:160]}"


def _too_large(problem: Problem, contender: Contender) -> str | None:
    needs, there = contender.needs_bytes(problem), memory.available_bytes()
    if there is None or needs <= MEMORY_SHARE * there:
        return None
    return f"needs about {needs / 1e9:.1f} GB, {there / 1e9:.1f} GB are free"


def _prepare(truth: Truth, contender: Contender) -> _Prepared:
    problem, made = truth.problem, []
    with contender.under():
        prepare_ms = wall_ms(lambda: made.append(contender.make[problem.op](problem)))
        (ready,) = made
        results: list[Any] = []
        first_ms = wall_ms(lambda: results.append(ready.call()))
    off = None
    if ready.layout is not Layout.PLAN:
        off = gate.check(truth, ready, results.pop())
    results.clear()
    warm_ms = wall_ms(ready.call)  # what compiling has left is freed by now, and does not hide what a call needs
    gc.collect()
    peak_bytes = memory.call_peak_bytes(ready.call) if problem.device == "cpu" else None
    return _Prepared(contender, ready, prepare_ms, first_ms, warm_ms, peak_bytes, off)


def _timed(prepared: dict[str, _Prepared], how: Thoroughness) -> Turns:
    """In turns. Who takes longer than its share of the budget leaves early, and its time is added to the budget."""
    share_ms = 1e3 * how.budget_s / max(len(prepared), 1)
    at_most, extra_ms = {}, 0.0
    for name, one in prepared.items():
        if one.warm_ms * how.rounds > share_ms:
            at_most[name] = max(min(int(share_ms / one.warm_ms), how.rounds), LEAST_ROUNDS if one.warm_ms < 5e3 else 1)
            extra_ms += at_most[name] * one.warm_ms
    calls = {name: one.ready.call for name, one in prepared.items()}
    rest_s = {name: one.contender.rest_s for name, one in prepared.items() if how.turn_ms}
    if how.turn_ms:
        time.sleep(BLAS_REST_S)  # the truth, too, is of NumPy's products
    budget_s = how.budget_s + extra_ms / 1e3 + how.rounds * sum(rest_s.values())
    return take_turns(calls, how.rounds, budget_s, how.turn_ms, at_most, rest_s)


def _record(
    problem: Problem,
    prepared: dict[str, _Prepared],
    left_out: dict[str, str],
    gate_off: float | None,
    turns: Turns,
    how: Thoroughness,
) -> Record:
    measured = {
        name: Measured(
            turns.samples[name].ms,
            tuple(sample.ms for sample in turns.made[name]),
            tuple(sample.waited_ms for sample in turns.made[name]),
            one.prepare_ms, one.first_ms, one.peak_bytes, one.off, one.ready.note,
        )
        for name, one in prepared.items()
    }  # fmt: skip
    prepared.clear()
    gc.collect()
    return Record(
        op=problem.op, suite=problem.case.suite, case=problem.case.name, expression=problem.text[:200],
        q_len=problem.q_len, heads=problem.heads, head_dim=problem.head_dim, dtype=problem.dtype, nnz=problem.nnz,
        density=problem.acsr.density, flops=problem.flops, metadata_bytes=problem.acsr.metadata_bytes,
        csr_bytes=problem.csr_bytes, waste=waste(problem), gate_off=gate_off,
        matmul_flops_per_s=peak_flops_per_s(problem, how.matmul), measured=measured, left_out=left_out,
        clean=turns.clean, foreign=turns.foreign,
    )  # fmt: skip


def peak_flops_per_s(problem: Problem, side: int) -> float:
    """What shares of the peak are stated of: on a CPU a float32 product, on a GPU one of the problem's dtype."""
    return cuda_matmul_flops_per_s(side, problem.dtype) if problem.device == "cuda" else matmul_flops_per_s(side)


def cuda_matmul_flops_per_s(side: int, dtype: str) -> float:
    """Of a square matrix product on JAX's GPU, of random numbers: zeros are faster. The best of rows of calls.

    float32 without tf32, as the kernels compute.
    """
    import jax

    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    product = jax.jit(lambda x: jax.numpy.matmul(x, x, precision=precision))
    call = Enqueued(lambda: product(a), jax.block_until_ready)
    call()
    return 2 * side**3 / min(row(call, TURN_MS)[-1] for _ in range(MATMUL_CALLS)) * 1e3


def matmul_flops_per_s(side: int) -> float:
    """Of a square float32 matrix product, the best call of JAX's and NumPy's, measured now."""
    a = np.random.default_rng(0).standard_normal((side, side), np.float32)
    best = []
    for call in (jitted(lambda x: x @ x, a), lambda: a @ a):
        call()
        best.append(min(wall_ms(call) for _ in range(MATMUL_CALLS)))
    time.sleep(BLAS_REST_S)
    return 2 * side**3 / min(best) * 1e3


def waste(problem: Problem) -> dict[str, float]:
    """Scores computed over non-zeros: by SPLAT's tiles as planned here, and by square blocks that hold any non-zero."""
    out = {"splat": splat.plan(problem.pattern, problem.q_len, head_dim=problem.head_dim, dtype=problem.dtype).waste}
    if problem.q_len <= BLOCKS_LONGEST:
        out[f"blocks of {BLOCK}"] = block_area(problem.acsr) / max(problem.nnz, 1)
    return out


def block_area(acsr: ACSR, block: int = BLOCK) -> int:
    """Pairs in square blocks that hold any non-zero: what a block mask computes. O(rows) where strides are short."""
    rows, columns = (-(-length // block) for length in acsr.shape)
    marks, hit = np.zeros((rows, columns + 1), np.int32), np.zeros((rows, columns), bool)
    block_row = np.arange(acsr.shape[0]) // block
    for component in acsr.components:
        start, count, stride = np.asarray(component.start), np.asarray(component.count), component.stride
        here = count > 0
        if stride <= block:  # every block between the first and the last has a column
            last = start + (count - 1) * stride
            np.add.at(marks, (block_row[here], start[here] // block), 1)
            np.add.at(marks, (block_row[here], last[here] // block + 1), -1)
        else:
            for t in range(component.width):
                here = count > t
                hit[block_row[here], (start[here] + stride * t) // block] = True
    hit |= np.cumsum(marks, axis=1)[:, :-1] > 0
    return int(hit.sum()) * block * block
