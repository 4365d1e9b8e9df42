"""What was measured: one record for an operation on a case at a size; one run for a command. JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from splat.bench.clock import quartiles
from splat.bench.problem import Key, task
from splat.errors import ArgumentError

FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Measured:
    """One contender's numbers.

    Attributes:
      ms: of the turns that count: each is the median call of a turn.
      all_ms, waited_ms: of all turns, and how long threads waited for a processor that others had.
      prepare_ms: making its format or mask; first_ms: the first call, compilation included.
      peak_bytes: that one warm call held beyond what was there before; None where unknown.
      off: largest error, as a share of its row's largest value; None where there is nothing to compare.
      note: what was chosen while preparing.
    """

    ms: tuple[float, ...]
    all_ms: tuple[float, ...]
    waited_ms: tuple[float, ...]
    prepare_ms: float
    first_ms: float
    peak_bytes: int | None
    off: float | None
    note: str = ""

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        return quartiles(self.ms)

    @staticmethod
    def of(data: Mapping[str, Any]) -> Measured:
        samples = {name: tuple(data[name]) for name in ("ms", "all_ms", "waited_ms")}
        return Measured(**{**data, **samples})


@dataclasses.dataclass(frozen=True)
class Record:
    """An operation on a case at a size, everyone's numbers.

    Attributes:
      dtype: of input and result.
      flops: over non-zeros only; 0 where not stated.
      metadata_bytes, csr_bytes: of ACSR's starts and counts; of CSR's indptr and indices.
      waste: scores computed over non-zeros, by whose tiles.
      gate_off: SPLAT's error at a small size, over all rows; None where it took no part.
      matmul_flops_per_s: of a dense matrix product, measured beside it.
      left_out: contender -> why.
      clean: rounds in which nobody waited for a processor, of all.
      foreign: share of the processors that others took.
    """

    op: str
    suite: str
    case: str
    expression: str
    q_len: int
    heads: int
    head_dim: int
    dtype: str
    nnz: int
    density: float
    flops: int
    metadata_bytes: int
    csr_bytes: int
    waste: dict[str, float]
    gate_off: float | None
    matmul_flops_per_s: float
    measured: dict[str, Measured]
    left_out: dict[str, str]
    clean: str
    foreign: float

    @property
    def key(self) -> Key:
        """What two runs are compared by."""
        return self.op, self.case, self.q_len, self.heads, self.head_dim, self.dtype

    @property
    def task(self) -> str:
        """What one table is of."""
        return task(self.op, self.dtype)

    def faster(self, ours: str, peer: str) -> float | None:
        """How many times `ours` is faster: ratio of medians. None where one of them is missing."""
        if ours not in self.measured or peer not in self.measured:
            return None
        return self.measured[peer].median_ms / self.measured[ours].median_ms

    def flops_per_s(self, name: str) -> float | None:
        if not self.flops or name not in self.measured:
            return None
        return self.flops / self.measured[name].median_ms * 1e3

    @staticmethod
    def of(data: Mapping[str, Any]) -> Record:
        measured = {name: Measured.of(one) for name, one in data["measured"].items()}
        return Record(**{**data, "measured": measured})


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that a command measured.

    Attributes:
      suite, command: what was asked for.
      settings: how thoroughly.
      machine: processor, versions, date.
      contenders: name -> what it is, SPLAT's own first.
      ours: the names of those that are SPLAT's; the first one is compared with the others.
      sparse: the names of the sparse formats.
      missing: peers that took no part -> why.
      records: in the order of measuring.
      failed: what could not be measured, or came out wrong.
    """

    suite: str
    command: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    contenders: dict[str, str]
    ours: tuple[str, ...]
    sparse: tuple[str, ...]
    missing: dict[str, str]
    records: tuple[Record, ...] = ()
    failed: tuple[str, ...] = ()

    def with_record(self, record: Record) -> Run:
        return dataclasses.replace(self, records=(*self.records, record))

    def with_failure(self, what: str) -> Run:
        return dataclasses.replace(self, failed=(*self.failed, what))

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """What there are tables of: operations, and each dtype apart."""
        return tuple(dict.fromkeys(record.task for record in self.records))

    @cached_property
    def peers(self) -> tuple[str, ...]:
        """Those with a number somewhere, in the order of tables."""
        return tuple(name for name in self.contenders if name not in self.ours and self.has(name))

    def has(self, name: str) -> bool:
        return any(name in record.measured for record in self.records)

    @cached_property
    def peaks(self) -> dict[str, float]:
        """By dtype the best matrix product that was seen while it ran: on a CPU float32, on a GPU the records' own."""
        out: dict[str, float] = {}
        for record in self.records:
            dtype = record.dtype if self.settings.get("device") == "cuda" else "float32"
            out[dtype] = max(out.get(dtype, 0.0), record.matmul_flops_per_s)
        return out

    def peak_flops_per_s(self, dtype: str) -> float:
        """What shares are of."""
        return self.peaks[dtype if dtype in self.peaks else "float32"]

    def of_task(self, task: str) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.task == task)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @staticmethod
    def of(data: Mapping[str, Any]) -> Run:
        fields = {field.name for field in dataclasses.fields(Run)}
        made = {name: value for name, value in data.items() if name in fields}
        for name in ("ours", "sparse", "failed"):
            made[name] = tuple(made[name])
        return Run(**{**made, "records": tuple(map(Record.of, data["records"]))})


def read(path: Path) -> Run:
    """A run that `--out` has kept. Raises ArgumentError where the file is none."""
    remedy = "Give the .json file that an earlier `splat bench ... --out DIR` has written."
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"--baseline {path} cannot be read: {error.strerror}. {remedy}") from None
    except ValueError as error:
        raise ArgumentError(f"--baseline {path} is no JSON: {error}. {remedy}") from None
    try:
        if data["format"] != FORMAT:
            raise ArgumentError(f"--baseline {path} is of format {data['format']}, not {FORMAT}. Measure it anew.")
        return Run.of(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(f"--baseline {path} holds no run of splat bench ({error!r}). {remedy}") from None
