"""The machine's rates through PyTorch: what shares of the peak are stated of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import report, timing
from benchmarks.gpu.worker import Bench


class MachineBench(Bench):
    """A large matrix product and a large copy, of random numbers: zeros are faster."""

    def prepare(self) -> None:
        size, elements = (8192, 1 << 31) if self.job.device == "cuda" else (256, 1 << 20)
        self.flops, self.bytes = 2.0 * size**3, 2.0 * 2 * elements
        kind: Any = dict(dtype=torch.bfloat16, device=self.job.device)
        left, right = torch.randn(size, size, **kind), torch.randn(size, size, **kind)
        source = torch.randn(elements, **kind)
        target = torch.empty_like(source)
        self.calls: dict[str, Callable[[], object]] = {
            "matmul": lambda: left @ right,
            "copy": lambda: target.copy_(source),
        }

    def measure(self) -> None:
        # Long enough for the clock to settle where it stays under load.
        samples = timing.interleave(self.calls, 20 if self.job.device == "cuda" else 2, clock=self.clock())
        matmul, copy = samples["matmul"], samples["copy"]
        facts = {}
        if self.job.device == "cuda":
            about = torch.cuda.get_device_properties(0)
            facts = dict(gpu=about.name, multiprocessors=about.multi_processor_count, memory_bytes=about.total_memory,
                         capability=f"{about.major}.{about.minor}")  # fmt: skip
        self.say(
            "machine", matmul_flops_per_s=1e3 * self.flops / matmul.median_ms, matmul_ms=matmul.ms, copy_ms=copy.ms,
            copy_bytes_per_s=1e3 * self.bytes / copy.median_ms, torch=torch.__version__,
            sm_clock_mhz=(report.ask_gpu("clocks.sm") or [None])[0], **facts,
        )  # fmt: skip


BENCH = MachineBench
