"""The process of one job: it prepares, says so, waits for its turn, and measures while the others wait.

What it says are lines of JSON behind a mark, so that whatever libraries print does no harm.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import timing
from benchmarks.gpu.jobs import Job

MARK = "splat-benchmark: "

#: kind of a job -> the module that holds its `BENCH`.
KINDS = {
    "machine": "benchmarks.gpu.machine",
    "attention": "benchmarks.gpu.attention",
    "jax-gate": "benchmarks.gpu.jax_side",
    "jax-peers": "benchmarks.gpu.jax_side",
    "masks": "benchmarks.gpu.masks",
    "tune": "benchmarks.gpu.tune",
}

#: Exit code of a process whose GPU context is lost.
LOST = 3


class Bench:
    """A job in its process. `prepare` compiles and checks beside others; `measure` has the machine to itself."""

    def __init__(self, job: Job, say: Callable[..., None]):
        self.job, self.say = job, say
        self.deadline = time.monotonic() + job.prepare_s

    def prepare(self) -> None:
        raise NotImplementedError

    def measure(self) -> None:
        raise NotImplementedError

    # -- help ----------------------------------------------------------------------------------------------------------

    def within(self, name: str, q_len: int, direction: str = "") -> bool:
        """Whether there is time for it; if not, it is named as left out. So is what an earlier process died of."""
        key = step_name(name, q_len, direction)
        if key in self.job.skip:
            return False  # said already, by who saw the process die
        if time.monotonic() < self.deadline:
            self.say("trying", name=key)
            return True
        self.say("dropped", name=name, q_len=q_len, direction=direction)
        return False

    @contextlib.contextmanager
    def guarded(
        self, name: str, q_len: int, direction: str = "", tried: Callable[[], Any] | None = None
    ) -> Iterator[None]:
        """What fails inside is reported and ends nothing else, unless the GPU's context is lost with it.

        `tried` is called after a failure that other lengths would share: any but a lack of memory.
        """
        from benchmarks.gpu import check

        try:
            yield
        except Exception as error:
            if check.is_fatal(error):
                raise
            self.say("error", name=name, q_len=q_len, direction=direction, message=check.summary(error))
            if tried is not None and not check.is_out_of_memory(error):
                tried()
        finally:
            self.free()

    def free(self) -> None:
        gc.collect()
        if self.job.device == "cuda" and "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()

    def clock(self) -> timing.Clock:
        return timing.CudaClock() if self.job.device == "cuda" else timing.wall_ms

    def peak_bytes(self, function: Callable[[], Any]) -> int | None:
        """Memory that a call takes beyond what was there before; None on the CPU."""
        if self.job.device != "cuda":
            return None
        cuda = sys.modules["torch"].cuda
        cuda.synchronize()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        function()
        cuda.synchronize()
        return cuda.max_memory_allocated() - before


def step_name(name: str, q_len: int, direction: str = "") -> str:
    return " ".join(str(part) for part in (name, q_len, direction) if part)


def main() -> None:
    job = Job.of(json.loads(sys.argv[1]))

    def say(what: str, **facts: Any) -> None:
        print(MARK + json.dumps({"what": what, "kind": job.kind, "suite": job.suite, "case": _only(job), **facts}))
        sys.stdout.flush()

    try:
        bench = importlib.import_module(KINDS[job.kind]).BENCH(job, say)
        bench.prepare()
        bench.free()
        say("ready")
        seconds = sys.stdin.readline().strip()
        if not seconds:
            return  # nobody is there any more
        bench.deadline = time.monotonic() + float(seconds)
        bench.measure()
        say("done")
    except Exception as error:
        from benchmarks.gpu import check

        if check.is_fatal(error):
            print(error, file=sys.stderr, flush=True)
            os._exit(LOST)  # no library's clean-up can be relied on
        raise


def _only(job: Job) -> str | None:
    return job.cases[0] if len(job.cases) == 1 else None


if __name__ == "__main__":
    main()
