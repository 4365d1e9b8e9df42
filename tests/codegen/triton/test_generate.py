"""The generated text: golden files, and what may and may not make two kernels differ.

After a change of the generator that is meant, `pytest tests/codegen/triton/test_generate.py --update-golden` writes the
files anew; review them as the code that they are.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import splat
from splat.codegen.base import Options
from splat.codegen.triton.launch import Launch
from splat.planning import Problem, make_plan

pytest.importorskip("triton", reason="triton is not installed: there is no text to look at")

from splat.codegen.triton import record

GOLDEN = Path(__file__).parents[2] / "golden" / "triton"

#: 12 components forward, 17 backward: a loop over walks.
MANY = "random_blocks(64, 12, 0)"

#: file -> (pattern, kernels by their name in `record.NAMES`, what else differs from the usual problem)
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "window": ("window(256)", ("forward", "d_query", "d_key_value"), {}),
    "causal_window_sink": ("causal() & window(256, 0) | sink(4)", ("forward", "d_key_value"), {}),
    "strided": ("strided(64)", ("forward", "d_key_value"), {}),
    "window_and_stride": ("window(128) | strided(128)", ("forward", "d_query"), {}),
    "looped": ("blocked(48, 1, 1) | sink(16) | random_blocks(48, 2, 0)", ("forward",), {}),
    "lengths_grouped": ("causal() & window(256, 0)", ("forward", "d_key_value"), dict(lengths=True, num_kv_heads=4)),
    "global_rows": ("global_rows(16)", ("merge",), dict(batch=9)),
    "decoding": ("causal() & (window(4096, 0) | sink(4))", ("forward", "merge"), dict(queries=1, lengths=True)),
}


def launches(
    pattern: str, *, q_len: int = 16384, num_kv_heads: int = 16, batch: int = 2, lengths: bool = False,
    queries: int | None = None, **sizes: int,
) -> list[Launch]:  # fmt: skip
    """With tile sizes that do not depend on the table of configurations; of the last `queries`, where given."""
    queries = q_len if queries is None else queries
    problem = Problem(splat.parse(pattern), queries, q_len, 128, 16, num_kv_heads, batch, "bfloat16")
    plan = make_plan(
        problem, implementation="triton", target="h100", query_offset=q_len - queries,
        **{"block_q": 64, "block_kv": 64, **sizes},
    )  # fmt: skip
    return record.launches(plan, Options(128**-0.5), lengths=lengths)


def sources(*args: Any, kernel: str, **kwargs: Any) -> list[str]:
    return [one.kernel.source for one in record.select(launches(*args, **kwargs), kernel)]


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, golden: Any) -> None:
    pattern, kernels, settings = CASES[name]
    texts = [text for kernel in kernels for text in sources(pattern, kernel=kernel, **settings)]
    head = f"# {pattern}" + "".join(f", {key}={value}" for key, value in settings.items())
    golden(GOLDEN / f"{name}.py.txt", "\n\n".join([head, *texts]))


def test_no_other_golden_files() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(f"{name}.py.txt" for name in CASES)


@pytest.mark.parametrize("name", CASES)
def test_texts_are_tidy(name: str) -> None:
    """Lines that fit, the kernel last, and no number in it that depends on sizes."""
    pattern, kernels, settings = CASES[name]
    for kernel in kernels:
        for text in sources(pattern, kernel=kernel, **settings):
            assert max(len(line) for line in text.splitlines() if not line.startswith("from ")) <= 120
            tree = ast.parse(text)
            defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            assert defined[-1] == record.NAMES[kernel]
            numbers = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
            assert not {16384, 16384 * 16, 16384 // 64} & numbers


@pytest.mark.parametrize("name", [name for name in CASES if name != "looped"])  # random blocks differ with the length
def test_equal_facts_are_one_kernel(name: str) -> None:
    """Whatever the length (long enough for every phase), heads and batch: one object, compiled once."""
    pattern, _, settings = CASES[name]
    first = launches(pattern, q_len=32768, **settings)
    for changes in (dict(q_len=49152), dict(q_len=32768, batch=settings.get("batch", 2) + 1)):
        second = launches(pattern, **{**settings, **changes})
        assert [one.kernel.name for one in first] == [one.kernel.name for one in second]
        for a, b in zip(first, second, strict=True):
            assert a.kernel is b.kernel


def test_patterns_differ_in_their_source() -> None:
    """Compilers remember kernels by their text: other comparisons, strides or phases must be other texts."""
    patterns = [
        "window(256)", "causal()", "strided(64)", "strided(128)", "full()", "window(128) | strided(128)",
        "causal() & (sink(4) | window(256, 0))", MANY,
    ]  # fmt: skip
    assert sources("window(256)", kernel="forward") == sources("causal() & window(300, 0)", kernel="forward")
    for kernel in ("forward", "d_query", "d_key_value"):
        texts = [tuple(sources(pattern, kernel=kernel)) for pattern in patterns]
        assert len(set(texts)) == len(texts), kernel


def test_variants_differ_in_their_source() -> None:
    plain = sources("causal()", kernel="d_key_value")
    assert sources("causal()", kernel="d_key_value", lengths=True) != plain
    assert sources("causal()", kernel="d_key_value", num_kv_heads=4) != plain
    assert sources("causal()", kernel="d_query", num_kv_heads=4) == sources("causal()", kernel="d_query")


@pytest.mark.parametrize("kernel", ["forward", "d_query", "d_key_value"])
def test_text_of_many_components(kernel: str) -> None:
    """It does not grow with the walks: one loop, in which every matrix product stands three times at most."""
    (text,) = sources(MANY, kernel=kernel)
    (one,) = record.select(launches(MANY), kernel)
    assert one.scalars[one.kernel.function.arg_names.index("num_walks") - len(one.arrays)] >= 12
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    step = {"forward": "attend"}.get(kernel, kernel)
    assert sum(isinstance(node.func, ast.Name) and node.func.id == step for node in calls) <= 3
    assert text.count("for walk in tl.range(0, num_walks, disable_licm=True):") == 1
    assert len(text) < 9000
