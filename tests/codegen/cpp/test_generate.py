"""The generated C++: golden files, and what may and may not make two kernels differ.

After a change of the generator that is meant, `pytest tests/codegen/cpp/test_generate.py --update-golden` writes the
files anew; review them as the code that they are. Nothing is compiled.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import splat
from splat import __version__
from splat.codegen.base import Options
from splat.codegen.cpp import generate
from splat.codegen.cpp.emit import IMPLEMENTATION, kernels_of
from splat.errors import ArgumentError, UnsupportedError
from splat.planning import Plan, Problem, make_plan

GOLDEN = Path(__file__).parents[2] / "golden" / "cpp"

MANY = "random_blocks(60, 12, 0)"
FEW = f"from_runs({[0] * 40}, [1], {[37 if row in (3, 20, 38) else 0 for row in range(40)]})"

#: file -> (pattern, kernels, what else differs from the usual problem)
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "window": ("window(256)", generate.KERNELS, {}),
    "causal_window_sink": ("causal() & window(256, 0) | sink(4)", ("forward", "d_key_value"), dict(dtype="bfloat16")),
    "strided": ("strided(64)", ("forward",), dict(dtype="float64", soft_cap=5.0)),
    "window_and_stride": ("window(128) | strided(128)", ("forward",), dict(head_dim=80)),
    "many_walks": (MANY, ("forward",), dict(dtype="float16")),
    "few_rows": (FEW, ("d_query",), dict(length=40)),
    "holes": ("lattice_columns(100, 7)", ("forward", "d_key_value"), {}),
}


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernels a backward takes depends on how many there are."""
    monkeypatch.setenv("NPROC", "2")


def plan_of(pattern: str, *, length: int = 16384, head_dim: int = 64, dtype: str = "float32", batch: int = 2) -> Plan:
    problem = Problem(splat.parse(pattern), length, length, head_dim, 16, 16, batch, dtype)
    return make_plan(problem, implementation="cpp")


def sources(pattern: str, *, kernel: str | None = None, soft_cap: float | None = None, **settings: Any) -> list[str]:
    """On any machine: without matrix tiles."""
    facts = kernels_of(plan_of(pattern, **settings), Options(0.125, soft_cap), kernel)
    return [generate.source(dataclasses.replace(one, amx=False)) for one in facts]


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, golden: Any) -> None:
    pattern, kernels, settings = CASES[name]
    texts = [text for kernel in kernels for text in sources(pattern, kernel=kernel, **settings)]
    head = f"// {pattern}" + "".join(f", {key}={value}" for key, value in settings.items()) + "\n"
    golden(GOLDEN / f"{name}.cpp.txt", "\n".join([head, *texts]).replace(f"splat {__version__}", "splat VERSION"))


def test_no_other_golden_files() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(f"{name}.cpp.txt" for name in CASES)


@pytest.mark.parametrize("name", CASES)
def test_texts_are_tidy(name: str) -> None:
    """Lines that fit, the kernel last, and no number in it that depends on sizes."""
    pattern, kernels, settings = CASES[name]
    for kernel in kernels:
        (text,) = sources(pattern, kernel=kernel, **settings)
        assert max(map(len, text.splitlines())) <= 120
        assert re.fullmatch(rf"SPLAT_KERNEL\({kernel}, Facts(, Pass\d)*\)", text.splitlines()[-1])
        assert not {"16384", "1024", "37", "40"} & set(re.findall(r"\d+", text.replace(__version__, "")))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("many_walks", "few_rows")])
def test_equal_facts_are_one_kernel(name: str) -> None:
    """Whatever the length (long enough for every phase), heads and batch."""
    pattern, _, settings = CASES[name]
    first = sources(pattern, length=32768, **settings)
    others: list[dict[str, Any]] = [dict(length=49152), dict(length=32768, batch=3)]
    for changes in others:
        assert sources(pattern, **settings, **changes) == first


def test_patterns_differ_in_their_source() -> None:
    """Compiled kernels are remembered by their text: other comparisons, strides or phases must be other texts."""
    patterns = [
        "window(256)", "causal()", "strided(64)", "strided(128)", "full()", "window(128) | strided(128)",
        "causal() & (sink(4) | window(256, 0))", "window(2)", MANY,
    ]  # fmt: skip
    assert sources("window(256)") == sources("causal() & window(300, 0)")
    for kernel in generate.KERNELS:
        texts = [tuple(sources(pattern, kernel=kernel)) for pattern in patterns]
        assert len(set(texts)) == (1 if kernel == "decode" else len(texts)), kernel
        variants: list[dict[str, Any]] = [{}, dict(head_dim=128), dict(dtype="bfloat16"), dict(soft_cap=3.0)]
        texts = [tuple(sources("causal()", kernel=kernel, **settings)) for settings in variants]
        assert len(set(texts)) == len(texts), kernel


# -- emit --------------------------------------------------------------------------------------------------------------


def test_emit() -> None:
    """All kernels, with the plan as comments before them; or one, by its long or short name."""
    text = splat.emit("causal() & window(8)", 64, target="cpp")
    plan = splat.plan("causal() & window(8)", 64, implementation="cpp")
    assert text.startswith(f"// splat {__version__}: C++ for CPUs\n// plan of causal() & window(8)\n")
    assert all(f"// {line}" in text.splitlines() for line in str(plan).splitlines()[:4])
    assert re.findall(r"SPLAT_KERNEL\((\w+)", text) == ["forward", "d_query", "d_key_value"]
    several = splat.emit("causal() & window(8)", 64, target="cpp", num_q_heads=8)
    assert re.findall(r"SPLAT_KERNEL\((\w+)", several) == ["forward", "backward"]
    for short, name in (("fwd", "forward"), ("dq", "d_query"), ("dkdv", "d_key_value")):
        one = splat.emit("causal() & window(8)", 64, target="cpp", kernel=short)
        assert one == splat.emit("causal() & window(8)", 64, target="cpp", kernel=name)
        assert re.findall(r"SPLAT_KERNEL\((\w+)", one) == [name]
    assert "soft_cap = true" in splat.emit("causal()", 64, target="cpp", kernel="fwd", logits_soft_cap=5)
    token = splat.emit("causal() & window(8)", 1, 64, query_offset=63, target="cpp", kernel="fwd")
    assert re.findall(r"SPLAT_KERNEL\((\w+)", token) == ["decode"]


def test_emit_where_there_is_little() -> None:
    nothing = splat.emit("sink(0)", 64, target="cpp")
    assert all(line.startswith("//") for line in nothing.splitlines())
    with pytest.raises(ArgumentError, match="this plan calls no kernel 'fwd'. Leave kernel out to see what it calls."):
        splat.emit("sink(0)", 64, target="cpp", kernel="fwd")
    with pytest.raises(
        ArgumentError, match="kernel must be one of forward, d_query, d_key_value, backward, decode, fwd,"
    ):
        splat.emit("causal()", 64, target="cpp", kernel="delta")
    with pytest.raises(UnsupportedError, match="shows its source only"):
        IMPLEMENTATION.assembly(plan_of("causal()"), Options(1.0))


def test_emit_without_a_backward() -> None:
    starts = [(n * 2654435761 >> 7) % 4 for n in range(4000)]  # no regular columns
    pattern = splat.from_runs(starts, 1, [n % 3 % 2 for n in range(4000)])
    text = splat.emit(pattern, 4000, 4, target="cpp")
    assert re.findall(r"SPLAT_KERNEL\((\w+)", text) == ["forward", "d_query"]
