"""The registry of cases: every pattern has the density that its name says."""

from __future__ import annotations

import pytest

import benchmarks.cases
import splat
from splat.bench import cases
from splat.bench.cases import Case


@pytest.mark.parametrize("q_len", [1024, 4096, 16384])
@pytest.mark.parametrize("case", cases.of("paper"), ids=lambda case: case.name)
def test_densities_are_what_the_names_say(case: Case, q_len: int) -> None:
    (pattern,) = case.patterns(q_len)
    said = int(case.name.split()[1]) / 100
    assert splat.build(pattern, q_len).density == pytest.approx(said, rel=0.01 if said != 0.33 else 0.02)


@pytest.mark.parametrize("q_len", [64, 100, 256, 1000])
def test_parameters_are_the_nearest(q_len: int) -> None:
    for density in (0.1, 0.5):
        for parameter, pattern in (
            (cases.window_of(q_len, density), splat.window),
            (cases.block_of(q_len, density), lambda p: splat.blocked(p, 1)),
        ):
            off = [abs(splat.build(pattern(p), q_len).density - density) for p in range(1, q_len)]
            assert abs(splat.build(pattern(parameter), q_len).density - density) == pytest.approx(min(off))


def test_benchmarks_use_the_registry() -> None:
    assert benchmarks.cases.CASES is cases.CASES
    assert set(cases.SUITES) == {"figures", "vocabulary", "paper", "sas", "models", "planning", "scaling"}
