"""`python -m benchmarks.run --device ...`: stages of jobs, what they say kept as it comes, tables at the end."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import jobs, pool, tables
from benchmarks.report import Report, machine, write_json

#: Suites that prepare together: while one group is measured, nothing compiles.
STAGES = (("sas",), ("gpu-planning", "models", "paper"), ("tune",))

#: A group with less time than this is not begun. Of what is left, preparing may take so much.
LEAST_STAGE_S, PREPARE_SHARE, MACHINE_S = 40.0, 0.6, 60.0

RESULTS = Path(__file__).parents[1] / "results"


class Record:
    """Everything that jobs said. Written after each message: a run that is ended keeps what it had."""

    def __init__(self, path: Path | None, rehearsal: bool):
        self.path, self.rehearsal = path, rehearsal
        self.messages: list[dict[str, Any]] = []
        self.facts = machine()

    def __call__(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        print(progress(message), flush=True)
        self.write()

    def write(self) -> None:
        if self.path:
            write_json(self.path, {"rehearsal": self.rehearsal, "machine": self.facts, "messages": self.messages})


def progress(message: dict[str, Any]) -> str:
    """A message in one line."""
    keys = ("case", "kernel", "name", "config", "binding", "q_len", "direction", "doing", "message")
    about = [message[key] for key in keys if message.get(key)] or [message["kind"]]
    if message["what"] == "time":
        about += [f"{name} {sorted(ms)[len(ms) // 2]:.3g} ms" for name, ms in message["ms"].items()]
    if message["what"] == "gate":
        about.append("; ".join(message["faults"]) or "passed")
    return f"  {message['what']}: {', '.join(map(str, about))}"


def run(given: argparse.Namespace, suites: list[str]) -> Iterator[Report]:
    """Measures; the tables. Refuses to keep a rehearsal's numbers among the results."""
    rehearsal = given.device == "cpu"
    record = Record(result_path(given.out, given.device), rehearsal)
    budget = pool.Budget(60 * given.minutes)
    parallel = given.jobs or (2 if rehearsal else max(1, min((os.cpu_count() or 2) - 2, 16)))
    pool.run_stage([jobs.machine_job(given.device)], record, budget, parallel=1, prepare_s=MACHINE_S)
    for stage in STAGES:
        chosen = [suite for suite in stage if suite in suites]
        made = [job for suite in chosen for job in jobs_of(given, suite)]
        for suite in chosen:
            record(asked(suite, [job for job in made if job.suite == suite]))
        if made and budget.left_s < LEAST_STAGE_S:
            for suite in chosen:
                record({"what": "dropped", "kind": "", "suite": suite, "case": None, "name": f"all of {suite}"})
        elif made:
            pool.run_stage(made, record, budget, parallel=parallel, prepare_s=PREPARE_SHARE * budget.left_s)
    yield from tables.every_report(record.messages, rehearsal=rehearsal)


def jobs_of(given: argparse.Namespace, suite: str) -> list[jobs.Job]:
    made = jobs.jobs(suite, given.device, only=given.cases, lengths=given.lengths, jax=given.jax)
    return configured(made, given.configs) if suite == "tune" and given.configs else made


def asked(suite: str, made: list[jobs.Job]) -> dict[str, Any]:
    """So that what is never measured is missed."""
    ours = [job for job in made if job.kind in ("attention", "masks")]
    names, lengths = [name for job in ours for name in job.cases], {q_len for job in ours for q_len in job.lengths}
    return {"what": "asked", "kind": "", "suite": suite, "case": None, "cases": names, "lengths": sorted(lengths)}


def configured(made: list[jobs.Job], path: Path) -> list[jobs.Job]:
    """The jobs with the configurations of a file: {kernel: [[block_q, block_kv, warps, stages, descriptors], ...]}."""
    wanted = json.loads(path.read_text(encoding="utf-8"))
    return [dataclasses.replace(j, configs=tuple(map(tuple, wanted[j.kernel]))) for j in made if j.kernel in wanted]


def result_path(out: Path | None, device: str) -> Path | None:
    """DIR/<device>-<date>.json, a number behind it where that is taken."""
    if out is None:
        return None
    if device == "cpu":
        if out.resolve().is_relative_to(RESULTS.resolve()):
            raise SystemExit("a rehearsal's numbers mean nothing: they are not written to benchmarks/results")
        return out / "rehearsal.json"
    name = re.sub(r"[^a-z0-9]+", "-", str((machine()["gpu"] or {"name": "gpu"})["name"]).lower().replace("nvidia ", ""))
    stem = f"{name}-{datetime.datetime.now(datetime.UTC).date()}"
    taken = [out / f"{stem}{suffix}.json" for suffix in ("", *(f"-{n}" for n in range(2, 100)))]
    return next(path for path in taken if not path.exists())


def kept(path: Path) -> list[Report]:
    """The tables of a file that a run wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return tables.every_report(data["messages"], rehearsal=data["rehearsal"])
