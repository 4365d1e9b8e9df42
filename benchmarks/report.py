"""What a suite hands back: a table for people, raw samples for machines, and which bars were met."""

from __future__ import annotations

import dataclasses
from typing import Any

import rich.box
import rich.table
from rich.markup import escape

from splat.bench.machine import ask_gpu, machine, write_json

__all__ = ["Report", "ask_gpu", "machine", "write_json"]


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
