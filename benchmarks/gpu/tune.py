"""Every configuration of one kernel for one pattern: compiled, compared with the table's first, timed in turns.

What comes out is for a person who edits `splat.planning.kernels`: the best configuration of each pattern, and what each
would cost all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

import splat
from benchmarks import timing
from benchmarks.gpu import check
from benchmarks.gpu.jobs import Job, case_of
from benchmarks.gpu.worker import Bench
from splat.codegen.base import Options
from splat.codegen.triton import interpret, record
from splat.codegen.triton.launch import Launch, Output
from splat.codegen.triton.program import UNKNOWN, Binding, Passes, Program, guards_of, passes_of
from splat.planning import Problem, find, make_plan
from splat.planning.kernels import kernel_configs
from splat.torch.programs import target_of

#: block_q, block_kv, warps, stages, descriptors.
Config = tuple[int, int, int, int, bool]

#: Beside the table's: kernel -> (block_q, block_kv, warps, stages), each with descriptors and with pointers.
CANDIDATES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "forward": ((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3),
                (64, 128, 4, 2), (128, 32, 8, 4)),
    "d_query": ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2),
                (128, 128, 8, 1)),
    "d_key_value": ((128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3),
                    (64, 64, 8, 3)),
}  # fmt: skip

#: Two configurations round differently; more is a wrong kernel.
LIMIT = 2e-2

SHARE_MS, ROUNDS = 1000.0, (5, 20)


def configs_of(job: Job, arch: str) -> list[Config]:
    """What to try: what was asked for, else the table's rows, then the candidates."""
    if job.configs:
        return list(job.configs)
    rows = kernel_configs(arch, job.kernel, job.sizes.head_dim, job.sizes.dtype)
    known = [(c.block_q, c.block_kv, c.num_warps, c.num_stages, c.descriptors) for c in rows]
    if job.device == "cpu":
        return known
    return list(dict.fromkeys(known + [(*c, way) for c in CANDIDATES[job.kernel] for way in (True, False)]))


def forced(launch: Launch, config: Config) -> Launch:
    """The launch, compiled as the configuration says; its tiles are the plan's."""
    constants = {**launch.constants, "DESCRIPTORS": config[4]}
    return dataclasses.replace(launch, num_warps=config[2], num_stages=config[3], constants=constants)


def execute(launch: Launch) -> list[Tensor]:
    """Carries out a launch on the current stream."""
    device = launch.arrays[0].device
    outputs = [torch.empty(x.shape, dtype=getattr(torch, x.dtype), device=device) for x in launch.outputs]
    if launch.programs:
        function: Any = launch.kernel.function[(launch.programs,)]
        with np.errstate(all="ignore"):  # the interpreter computes with NumPy
            function(*launch.arrays, *launch.scalars, *outputs, num_warps=launch.num_warps,
                     num_stages=launch.num_stages, **launch.constants)  # fmt: skip
    return outputs


def _strides(array: Any) -> tuple[int, int, int]:
    return record.strides(array) if isinstance(array, Output) else array.stride()[:3]


class TuneBench(Bench):
    """One pattern, one kernel. `launches` holds, for each configuration, the kernel's launches with their arrays."""

    def prepare(self) -> None:
        (name,) = self.job.cases
        (self.q_len,) = self.job.lengths[:1]
        self.pattern = splat.parse(case_of(name).expression(self.q_len))
        self.target = target_of(torch.device(self.job.device))
        self.launches: dict[Config, list[Launch]] = {}
        if interpret.is_interpreted():
            interpret.repair()
        elif hasattr(triton, "set_allocator"):
            triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
        self._saved, self._first = self._usual(), None
        for config in configs_of(self.job, find(self.target).arch):
            if self.within(_name(config), self.q_len):
                with self.guarded(_name(config), self.q_len):
                    self._prepare_one(config)

    def _usual(self) -> dict[str, Any]:
        """Inputs, and what the table's configurations make of them."""
        sizes = self.job.sizes
        arrays = check.inputs(self.q_len, sizes.heads, sizes.head_dim, sizes.dtype, self.job.device)
        query, key, value, d_out = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in arrays)
        plan = self._plan(None, None)
        out, lse = self._program(execute).forward(passes_of(plan, "forward"), query, key, value)
        out = out.transpose(1, 2)  # made as [B, T, N, H]
        return dict(query=query, key=key, value=value, d_out=d_out, out=out, lse=lse, plan=plan)

    def _plan(self, block_q: int | None, block_kv: int | None) -> Any:
        sizes = self.job.sizes
        problem = Problem(self.pattern, self.q_len, self.q_len, sizes.head_dim, 1, 1, 1, sizes.dtype)
        return make_plan(problem, implementation="triton", target=self.target, block_q=block_q, block_kv=block_kv)

    def _program(self, launcher: Callable[[Launch], list[Any]]) -> Program:
        sizes, device = self.job.sizes, self.job.device
        kinds = record.Sizes(
            1, self.q_len, self.q_len, sizes.heads, sizes.heads, sizes.head_dim, sizes.dtype
        )  # fmt: skip
        binding = Binding(
            launcher, _strides, lambda b, n, t, h: (b, t, n, h), functools.partial(_table, device),
            lambda shape, dtype, value: torch.full(shape, value, dtype=getattr(torch, dtype), device=device),
            descriptors=True,
        )  # fmt: skip
        return Program(Options(1 / math.sqrt(sizes.head_dim)), kinds, find(self.target), UNKNOWN, binding)

    def _prepare_one(self, config: Config) -> None:
        """Compiles, and compares with the first configuration that worked."""
        begin, kept = time.perf_counter(), []

        def launcher(launch: Launch) -> list[Tensor]:
            if launch.kernel.name != record.NAMES[self.job.kernel]:
                return execute(launch)
            kept.append(forced(launch, config))
            return execute(kept[-1])

        results = self._run(self._program(launcher), config)
        if not kept:
            raise RuntimeError("the plan launches no such kernel")
        off = 0.0
        if self._first is None:
            self._first = results
        else:
            off = max(_off(x, y) for x, y in zip(results, self._first, strict=True))
        self.say("config", config=config, q_len=self.q_len, s=time.perf_counter() - begin, off=off, launches=len(kept))
        if not off <= LIMIT:
            raise RuntimeError(f"results are {off:.2g} away from those of the first configuration, limit {LIMIT:g}")
        self.launches[config] = kept

    def _run(self, program: Program, config: Config) -> list[Tensor]:
        """What the kernel makes, with every kernel that it takes."""
        s, plan = self._saved, self._plan(config[0], config[1])
        program = dataclasses.replace(program, guards=guards_of(plan))
        if self.job.kernel == "forward":
            return list(program.forward(passes_of(plan, "forward"), s["query"], s["key"], s["value"]))
        passes: dict[str, Passes] = {which: passes_of(s["plan"], which) for which in ("d_query", "d_key_value")}
        passes[self.job.kernel] = passes_of(plan, self.job.kernel)
        made = program.backward(
            passes["d_query"], passes["d_key_value"], s["query"], s["key"], s["value"], None,
            s["out"], s["lse"], s["d_out"],
        )  # fmt: skip
        return [made[0]] if self.job.kernel == "d_query" else list(made[1:])

    def measure(self) -> None:
        clock = self.clock()

        def call(launches: list[Launch]) -> Callable[[], Any]:
            return lambda: [execute(launch) for launch in launches]

        calls = {_name(config): call(launches) for config, launches in self.launches.items()}
        if calls and self.within("timing", self.q_len):
            for one in calls.values():
                one()
            once = sum(clock(one) for one in calls.values())
            rounds = 2 if self.job.device == "cpu" else int(min(max(SHARE_MS / once, ROUNDS[0]), ROUNDS[1]))
            samples = timing.interleave(calls, rounds, clock=clock)
            self.say("tuned", kernel=self.job.kernel, q_len=self.q_len, ms={n: s.ms for n, s in samples.items()})


def _table(device: str, table: np.ndarray) -> Tensor:
    return torch.tensor(table, dtype=torch.int32, device=device)


def _off(ours: Tensor, first: Tensor) -> float:
    """Relative difference; log-sum-exps are -inf in the same places, or it is NaN."""
    both = torch.isneginf(ours) & torch.isneginf(first)
    ours, first = ours.double().masked_fill(both, 0.0), first.double().masked_fill(both, 0.0)
    return float((ours - first).norm() / first.norm().clamp(min=1e-30))


def _name(config: Config) -> str:
    block_q, block_kv, warps, stages, descriptors = config
    return f"{block_q}x{block_kv} w{warps} s{stages} {'descriptors' if descriptors else 'pointers'}"


BENCH = TuneBench
