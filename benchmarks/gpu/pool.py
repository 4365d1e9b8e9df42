"""Processes of jobs: all prepare together, each measures alone, and a process that dies takes nobody along."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import Job
from benchmarks.gpu.worker import MARK

Message = dict[str, Any]

#: How often a job is begun again without the step that its process died of.
RETRIES = 3

#: How much longer than it was given a process may measure before it is ended.
GRACE_S = 20.0

#: A job that would be given less is not begun.
LEAST_S = 3.0


class Budget:
    """The time that is left for everything."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()


@dataclasses.dataclass(eq=False)
class Worker:
    """A process. Its messages arrive in a queue shared by all, as (worker, message); (worker, None) is its end."""

    job: Job
    process: subprocess.Popen[str]
    errors: Any
    begun: float
    trying: str = ""
    listener: threading.Thread | None = None

    @staticmethod
    def start(job: Job, inbox: queue.Queue[tuple[Worker, Message | None]]) -> Worker:
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        process = subprocess.Popen(
            command(job),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=Path(__file__).parents[2],
            env=environment(job.device),
        )
        worker = Worker(job, process, errors, time.monotonic())
        worker.listener = threading.Thread(target=worker._listen, args=(inbox,), daemon=True)
        worker.listener.start()
        return worker

    def _listen(self, inbox: queue.Queue[tuple[Worker, Message | None]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                inbox.put((self, json.loads(line.removeprefix(MARK))))
        inbox.put((self, None))

    def go(self, seconds: float) -> None:
        """Its turn."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has died, which its last message will say
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()

    def last_words(self) -> str:
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        return (lines or ["it said nothing"])[-1][:300]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.listener is not None
        self.listener.join(timeout=10)
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                with contextlib.suppress(OSError):  # a pipe that nobody reads any more
                    stream.close()


def command(job: Job) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.worker", json.dumps(dataclasses.asdict(job))]


def environment(device: str) -> dict[str, str]:
    """Of a job's process: no framework may take all memory, and compilers of one process do not multiply."""
    root = Path(__file__).parents[2]
    paths = [str(root / "src"), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {
        "PYTHONPATH": os.pathsep.join(paths),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    if device == "cpu":
        settings |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if inherited.get("JAX_PLATFORMS") == "cpu":
        inherited.pop("JAX_PLATFORMS")
    return {**inherited, **settings}


def run_stage(
    jobs: Iterable[Job], record: Callable[[Message], None], budget: Budget, *, parallel: int, prepare_s: float
) -> None:
    """Carries out jobs, the most important first; every message goes to `record`."""
    stage = _Stage(list(jobs), record, budget, parallel, prepare_s)
    try:
        stage.prepare()
        stage.measure()
    finally:
        for worker in [*stage.preparing, *stage.ready]:
            worker.end()


class _Stage:
    def __init__(self, jobs: list[Job], record: Callable[[Message], None], budget: Budget, parallel: int, limit: float):
        self.jobs, self.pending = jobs, list(jobs)
        self.record, self.budget, self.parallel = record, budget, parallel
        self.limit_s = limit
        self.inbox: queue.Queue[tuple[Worker, Message | None]] = queue.Queue()
        self.preparing: list[Worker] = []
        self.ready: list[Worker] = []

    def prepare(self) -> None:
        """Until everyone is ready, dead, or out of time."""
        end = time.monotonic() + min(self.limit_s, self.budget.left_s)
        while (self.pending or self.preparing) and time.monotonic() < end:
            while self.pending and len(self.preparing) < self.parallel:
                # A process stops compiling by itself a little before it would be ended.
                left = 0.85 * (end - time.monotonic())
                job = dataclasses.replace(self.pending.pop(0), prepare_s=left)
                self.preparing.append(Worker.start(job, self.inbox))
            self._hear(end - time.monotonic())
        for worker in self.preparing:
            self._tell(worker.job, "dropped", name=worker.job.name, doing=f"preparing {worker.trying}".strip())
            worker.end()
        for job in self.pending:
            self._tell(job, "dropped", name=job.name, doing="waiting to prepare")
        self.preparing, self.pending = [], []

    def _hear(self, timeout_s: float) -> None:
        try:
            worker, message = self.inbox.get(timeout=max(min(timeout_s, 1.0), 0.01))
        except queue.Empty:
            return
        if message is None:
            if worker in self.preparing:
                self.preparing.remove(worker)
                self._bury(worker)
            elif worker in self.ready:
                self.ready.remove(worker)
                self._tell(worker.job, "error", name=worker.job.name, message=f"ended early: {worker.last_words()}")
                worker.end()
        elif message["what"] == "trying":
            worker.trying = message["name"]
        elif message["what"] == "ready":
            if worker in self.preparing:
                self.preparing.remove(worker)
                self.ready.append(worker)
                self._tell(worker.job, "prepared", s=time.monotonic() - worker.begun)
        else:
            self.record(message)

    def _bury(self, worker: Worker) -> None:
        """A process died while it prepared: its job is begun again without what it died of."""
        job = worker.job
        code, words = worker.process.wait(), worker.last_words()
        again = bool(worker.trying) and worker.trying not in job.skip and len(job.skip) < RETRIES
        self._tell(job, "error", name=worker.trying or job.name, message=f"its process ended with {code}: {words}")
        worker.end()
        if again:
            self.pending.insert(0, dataclasses.replace(job, skip=(*job.skip, worker.trying)))

    def measure(self) -> None:
        """One after the other, in the order of the jobs."""
        order = {job.name: n for n, job in enumerate(self.jobs)}
        for worker in sorted(self.ready, key=lambda one: order[one.job.name]):
            if worker not in self.ready:
                continue
            if self.budget.left_s < LEAST_S:
                self._tell(worker.job, "dropped", name=worker.job.name, doing="waiting to be timed")
                continue
            self._turn(worker)

    def _turn(self, worker: Worker) -> None:
        seconds = self.budget.left_s
        worker.go(seconds)
        end = time.monotonic() + seconds + GRACE_S
        while time.monotonic() < end and worker in self.ready:
            try:
                other, message = self.inbox.get(timeout=1.0)
            except queue.Empty:
                continue
            if message is None and other in self.ready:
                self.ready.remove(other)
                self._tell(other.job, "error", name=other.job.name, message=f"ended early: {other.last_words()}")
                other.end()
            elif message is not None and message["what"] == "done":
                self.ready.remove(other)
                other.end()
            elif message is not None and message["what"] != "trying":
                self.record(message)
        if worker in self.ready:
            self.ready.remove(worker)
            self._tell(worker.job, "error", name=worker.job.name, message="it did not end in time")
            worker.end()

    def _tell(self, job: Job, what: str, **facts: Any) -> None:
        case = job.cases[0] if len(job.cases) == 1 else None
        self.record({"what": what, "kind": job.kind, "suite": job.suite, "case": case, **facts})
