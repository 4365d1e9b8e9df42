"""Preparing a pattern: our plans and tables, on the device, beside FlexAttention's `create_block_mask`, compiled."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn.attention import flex_attention

import splat
from benchmarks import timing
from benchmarks.gpu import flex
from benchmarks.gpu.jobs import case_of
from benchmarks.gpu.worker import Bench
from splat.codegen.triton import program
from splat.planning import SCHEDULES, Problem, make_plan
from splat.planning import plan as planner
from splat.torch.programs import target_of


class MasksBench(Bench):
    """One pattern: cold preparation, forward and backward, each side all that a first call needs but compiled code."""

    def prepare(self) -> None:
        (name,) = self.job.cases
        self.case = case_of(name)
        self.made: dict[int, Any] = {}
        self.first_s: dict[int, float] = {}
        for q_len in self.job.lengths:
            if self.within("create_block_mask", q_len):
                self._first(q_len)

    def _first(self, q_len: int) -> None:
        with self.guarded("create_block_mask", q_len):
            begin = time.perf_counter()
            make = self._block_mask(q_len)
            make()
            self.made[q_len], self.first_s[q_len] = make, time.perf_counter() - begin

    def _block_mask(self, q_len: int) -> Any:
        mod = flex.mask_mod(self.case.expression(q_len), q_len, self.job.device)
        function: Any = flex_attention.create_block_mask
        if self.job.device == "cuda":
            flex.allow_recompiling()
            function = torch.compile(function, dynamic=False)

        def make() -> None:
            function(mod, None, None, q_len, q_len, device=self.job.device, BLOCK_SIZE=flex.BLOCKS[0])
            self._wait()

        return make

    def _prepare_ours(self, q_len: int) -> None:
        planner._remembered.clear()
        sizes, pattern = self.job.sizes, splat.parse(self.case.expression(q_len))
        target = target_of(torch.device(self.job.device))
        problem = Problem(pattern, q_len, q_len, sizes.head_dim, 1, 1, 1, sizes.dtype)
        plan = make_plan(problem, implementation="triton", target=target)
        for which in SCHEDULES:
            for _, tables in program.passes_of(plan, which):
                for table in tables.values():
                    torch.tensor(table, device=self.job.device)
        self._wait()

    def _wait(self) -> None:
        if self.job.device == "cuda":
            torch.cuda.synchronize()

    def measure(self) -> None:
        for q_len in self.job.lengths:
            if self.within("planning", q_len):
                ours = timing.interleave({"splat": lambda n=q_len: self._prepare_ours(n)}, 7)["splat"]
                ms = {"splat": ours.ms}
                peak: dict[str, int | None] = {"splat": timing.traced_peak_bytes(lambda n=q_len: self._prepare_ours(n))}
                if q_len not in self.made:
                    self._first(q_len)  # alone, it has all the memory
                if q_len in self.made:
                    with self.guarded("create_block_mask", q_len):
                        make = self.made[q_len]
                        ms["create_block_mask"] = timing.interleave({"theirs": make}, 3)["theirs"].ms
                        peak["create_block_mask"] = self.peak_bytes(make)
                self.say("masks", q_len=q_len, ms=ms, peak_bytes=peak, first_call_s=self.first_s.get(q_len))


BENCH = MasksBench
