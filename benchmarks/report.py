"""What a suite hands back: a table for people, raw samples for machines, and which bars were met."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import rich.box
import rich.table
from rich.markup import escape

PACKAGES = ("splat-attention", "jax", "jaxlib", "jax-triton", "numpy", "torch", "triton")


@dataclasses.dataclass
class Report:
    """One table. Rows are strings; `samples` holds the raw numbers behind them, one JSON object a row.

    Attributes:
      name: of the suite, also the file's.
      title: what was measured, and the bars.
      columns: headings.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    bars: int = 0

    def add(self, *cells: str, **sample: Any) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{self.name}: {len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(cells)
        self.samples.append(sample)

    def judge(self, what: str, measured: float, bar: float | None, *, at_least: bool = False) -> str:
        """The cell that says whether a bar is met; empty where there is none."""
        if bar is None:
            return ""
        self.bars += 1
        met = measured >= bar if at_least else measured <= bar
        if not met:
            self.failed.append(f"{what}: {measured:.4g}, bar {bar:g}")
        return f"{'≥' if at_least else '≤'} {bar:g} {'pass' if met else 'FAIL'}"

    def table(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, box=rich.box.SIMPLE_HEAD, title_justify="left", caption=self.verdict)
        table.caption_justify = "left"
        for n, column in enumerate(self.columns):
            # Names may be broken over lines, numbers may not.
            table.add_column(column, justify="left" if n == 0 else "right", no_wrap=n > 0, overflow="fold")
        for row in self.rows:
            table.add_row(*(escape(cell) for cell in row), style="red" if "FAIL" in "".join(row) else None)
        return table

    @property
    def verdict(self) -> str:
        if not self.bars:
            return "no bar applies here"
        missed = "".join(f"\n  missed: {line}" for line in self.failed)
        return f"{self.bars - len(self.failed)} of {self.bars} bars met{missed}"

    def to_json(self) -> dict[str, Any]:
        return {
            "suite": self.name,
            "title": self.title,
            "machine": machine(),
            "bars": self.bars,
            "missed": self.failed,
            "samples": self.samples,
        }


def machine() -> dict[str, Any]:
    """What the numbers depend on, and the date; nothing that names the host or its folders."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": _cpu_name(),
        "gpu": _gpu_facts(),
        "threads": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


#: What nvidia-smi is asked: name in the facts -> its field.
_GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
}


def _gpu_facts() -> dict[str, str] | None:
    """Of the first NVIDIA GPU, as its driver tells them; None where there is none."""
    answer = ask_gpu(*_GPU_FIELDS.values())
    return None if answer is None else dict(zip(_GPU_FIELDS, answer, strict=True))


def ask_gpu(*fields: str) -> list[str] | None:
    """What nvidia-smi answers for the first GPU; None where there is neither."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    answer = [value.strip() for value in (done.stdout.splitlines() or [""])[0].split(",")]
    return answer if len(answer) == len(fields) else None


def write_json(path: Path, data: Any) -> None:
    """Writes atomically: a reader sees the whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by their owner only, and results are shared.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
