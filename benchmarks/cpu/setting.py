"""What is measured under which conditions, and where what has been measured goes meanwhile."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.cases import named
from benchmarks.report import Report, write_json

THREADS, BATCH, HEADS = 2, 1, 8
DTYPES = ("float32", "bfloat16")
WINDOW = "window(256)"
_CASES = named("figures", "window 256", "causal window 512", "blocked 128", "window and global", "dense causal")
PATTERNS = tuple(case.expression(4096) for case in _CASES)


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention: a pattern's text and the sizes. Batch and heads are always the same."""

    text: str
    q_len: int
    head_dim: int
    dtype: str

    @property
    def cells(self) -> tuple[str, str, str, str]:
        return self.text, f"{self.q_len:,}", str(self.head_dim), self.dtype

    def __str__(self) -> str:
        return f"{self.text} {self.q_len:,} H {self.head_dim} {self.dtype}"


#: The headings of `Case.cells`.
CASE_COLUMNS = ("pattern", "positions", "H", "type")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How thoroughly to measure.

    Attributes:
      quick: a rehearsal at sizes that mean nothing: no bar applies.
      flex: whether PyTorch's peers are measured where torch is installed.
      out: the folder of the raw samples; None keeps none.
      only_texts, only_lengths: of the suites with many cases, these alone; empty: all.
    """

    quick: bool = False
    flex: bool = True
    out: Path | None = None
    only_texts: tuple[str, ...] = ()
    only_lengths: tuple[int, ...] = ()

    @staticmethod
    def of(given: argparse.Namespace) -> Setting:
        return Setting(given.quick, given.flex, given.out, tuple(given.cases), tuple(given.lengths))

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 21

    @property
    def budget_s(self) -> float:
        """Of one comparison, the calls that compile left out; three rounds are made whatever they take."""
        return 0.5 if self.quick else 10.0

    def length(self, q_len: int) -> int:
        return min(q_len, 256) if self.quick else q_len

    @property
    def gate_length(self) -> int:
        return self.length(1024)  # the widest window has an edge there

    def bar(self, value: float) -> float | None:
        """The bar; none applies in a rehearsal."""
        return None if self.quick else value

    def cases(self, texts: tuple[str, ...], lengths: tuple[int, ...], head_dims: tuple[int, ...]) -> list[Case]:
        """Every combination, those of one pattern and length together: they share a block mask."""
        if self.quick:
            texts, lengths, head_dims = texts[:1], (self.length(lengths[0]),), (8,)
        return [
            Case(text, q_len, head_dim, dtype)
            for text in texts
            if not self.only_texts or text in self.only_texts
            for q_len in lengths
            if not self.only_lengths or q_len in self.only_lengths
            for head_dim in head_dims
            for dtype in DTYPES
        ]

    # -- while it runs -------------------------------------------------------------------------------------------------

    def add(self, report: Report, *cells: str, **sample: object) -> None:
        """`Report.add`, said and written at once: a run that is ended keeps what it had."""
        report.add(*cells, load_average=os.getloadavg()[0], **sample)
        print(f"  {report.name}: {'  '.join(cell for cell in cells if cell)}", file=sys.stderr, flush=True)
        if self.out:
            write_json(self.out / f"{report.name}.json", report.to_json())

    @contextlib.contextmanager
    def attempt(self, report: Report, what: object) -> Iterator[None]:
        """One case, whose failure is a row of the report and a bar that is missed, and ends nothing else."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            message = f"FAIL: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:100]}"
            cells = what.cells if isinstance(what, Case) else (str(what),)
            cells = (*cells, message, *[""] * len(report.columns))[: len(report.columns)]
            report.bars += 1
            report.failed.append(f"{what}: {message}")
            self.add(report, *cells, what=str(what), error=traceback.format_exc())


def arrays(q_len: int, head_dim: int, heads: int = HEADS) -> list[np.ndarray]:
    """query, key, value and a cotangent, float32 [B, T, N, H], the same in every process."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((BATCH, q_len, heads, head_dim), np.float32) for _ in range(4)]
