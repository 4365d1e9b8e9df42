"""One command's worth of measuring: who takes part, all problems in order, everything kept as it is made."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from splat.bench import machine, memory, peers, variants
from splat.bench.measure import Tell, Thoroughness, brief, matmul_flops_per_s, measure, thoroughness
from splat.bench.peers import Contender, Kind, ours
from splat.bench.problem import Problem
from splat.bench.record import Run
from splat.bench.suites import Selection, Suite, problems
from splat.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
      against: names of peers; empty: all that can take part.
      implementations: of SPLAT; empty: the best that can serve. The first is compared with everyone else.
      threads: of everyone, on a CPU.
      command: as it was typed, for the report.
    """

    suite: Suite
    selection: Selection
    against: tuple[str, ...] = ()
    implementations: tuple[str, ...] = ()
    threads: int = 2
    command: str = ""


#: Told of every record: the run so far, and how many problems there are.
Listener = Callable[[Run, int], None]


@contextlib.contextmanager
def prepared(request: Request) -> Iterator[None]:
    """The process as it is to be measured: device, threads, memory that is kept, and no kernels compiled before.

    It has to be entered before JAX starts, whose threads and platform are settled by then.
    """
    selection = request.selection
    if selection.device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    else:  # PyTorch's peers need memory of the GPU too
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # The threads of PyTorch spin after a call otherwise, and slow down what is measured next.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with contextlib.ExitStack() as stack:
        if not selection.quick:
            memory.keep_memory()
            memory.one_heap()
            stack.enter_context(_empty_caches())
        if selection.device == "cpu":
            stack.enter_context(machine.confined(request.threads))
        yield


@contextlib.contextmanager
def _empty_caches() -> Iterator[None]:
    """Folders of their own for compiled kernels, so that first calls are first calls; removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="splat-bench-") as folder:
        names = ("SPLAT_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        before = {name: os.environ.get(name) for name in names}
        os.environ.update({name: str(Path(folder) / name.lower()) for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def contenders(request: Request, todo: Sequence[Problem]) -> tuple[list[Contender], dict[str, str]]:
    """(everyone, SPLAT first; peers that take no part and why). Raises ArgumentError, UnsupportedError."""
    selection, suite = request.selection, request.suite
    _check_device(selection.device)
    if suite.ablation and request.against:
        raise ArgumentError(
            f"--against cannot go with --ablate or the suite ablation, which measure SPLAT's own variants instead of "
            f"peers, but {', '.join(request.against)} was given. Leave one of them out."
        )
    ops = tuple(dict.fromkeys(problem.op for problem in todo))
    everyone: list[Contender] = []
    if set(ops) - {"planning"}:
        names = [
            ours.served_by(name, selection.device, dtype, todo[0].head_dim)
            for name in request.implementations or (None,)
            for dtype in dict.fromkeys(problem.dtype for problem in todo)
        ]
        everyone += [ours.contender(name) for name in dict.fromkeys(names)]
    if "planning" in ops:
        everyone.append(ours.planning())
    if suite.ablation:
        return [*everyone, *variants.contenders(everyone[0])], {}
    taking_part, left_out = peers.chosen(request.against, ops, selection.device, selection.quick)
    if selection.device == "cpu" and any("torch" in peer.packages for peer in taking_part):
        import torch

        torch.set_num_threads(request.threads)
    return [*everyone, *taking_part], left_out


def _check_device(device: str) -> None:
    import jax

    if device == "cuda" and jax.default_backend() != "gpu":
        raise ArgumentError(
            f"--device cuda needs a GPU, but JAX has {jax.default_backend()} here. `splat doctor` says what it sees."
        )


def run(request: Request, *, tell: Tell, listen: Listener, how: Thoroughness | None = None) -> Run:
    """Measures everything; call it within `prepared`.

    SPLAT's failures are collected in `failed`, and do not end the run.
    """
    todo = problems(request.suite, request.selection)
    how = how or thoroughness(request.selection.device, request.selection.quick)
    everyone, left_out = contenders(request, todo)
    made = Run(
        suite=request.suite.name,
        command=request.command,
        settings={**dataclasses.asdict(how), "threads": request.threads, "device": request.selection.device,
                  "quick": request.selection.quick},
        machine=machine.machine(),
        contenders={one.name: one.title for one in everyone},
        ours=tuple(one.name for one in everyone if one.kind is Kind.OURS),
        sparse=tuple(one.name for one in everyone if one.kind is Kind.SPARSE),
        missing=left_out,
    )  # fmt: skip
    matmul_flops_per_s(16)  # what JAX needs to start is nobody's first call
    for problem in todo:
        try:
            made = made.with_record(measure(problem, everyone, how, tell))
        except Exception as error:
            made = made.with_failure(f"{problem}: {brief(error)}")
        # Arrays and compiled functions of a problem go with it.
        problem.release()
        listen(made, len(todo))
    return made
