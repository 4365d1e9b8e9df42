"""The generated kernels, interpreted on NumPy arrays, against dense attention in float64: values and gradients.

What is here besides the patterns is what no caller can choose: block sizes, memory layouts, descriptors or pointers,
wide addresses. `tests/ops/test_attention_triton.py` runs the same kernels behind JAX.
"""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import splat
from splat.planning import Plan
from tests.attention_suite import MODELS, SPARSE_SUITE, VOCABULARY, compare, draw_inputs, truth
from tests.strategies import Case, cases, fewer

pytest.importorskip("triton", reason="triton is not installed: the interpreted kernels are untested here")

from tests.codegen.triton.numpy_attention import Layout, attend, check, plan_of

pytestmark = pytest.mark.sampled(1 / 3)

#: Two walks and, with strides, passes that are merged; a tile that two components share; edges on both sides.
LOCAL = "causal() & (sink(2) | window(9, 0))"
MERGED = "window(3) | strided(4)"

BLOCKS = [(16, 16), (32, 16), (16, 32), (64, 32)]


def blocks(block_q: int, block_kv: int) -> dict[str, Any]:
    return dict(block_q=block_q, block_kv=block_kv)


def walks(plan: Plan, which: str = "forward") -> list[int]:
    return [len(one.walks) for one in getattr(plan, which).passes]


# -- patterns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*VOCABULARY, *SPARSE_SUITE.values(), *MODELS.values()], ids=lambda text: text[:32])
def test_patterns(text: str, rng: np.random.Generator) -> None:
    length = 40 if text in VOCABULARY else 48
    check(text, draw_inputs(rng, length, length))


@fewer(2)
@given(
    cases(max_len=40, depth=2),
    st.sampled_from([(1, 1), (2, 1)]),
    st.sampled_from([None, 2.0]),
    st.sampled_from(BLOCKS),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_composed_patterns(
    case: Case, heads: tuple[int, int], cap: float | None, sizes: tuple[int, int], with_lengths: bool, seed: int
) -> None:
    hypothesis.assume(len(case.pattern.runs(case.rows, case.cols)) <= 10)  # others take as long as all these
    rng = np.random.default_rng(seed)
    inputs = draw_inputs(rng, case.q_len, case.kv_len, heads=heads, head_dim=4)
    lengths = [int(rng.integers(0, case.kv_len + 3))] if with_lengths else None
    settings = dict(query_offset=case.query_offset) | blocks(*sizes)
    try:
        check(case.pattern, inputs, mask=case.mask, settings=settings, lengths=lengths, logits_soft_cap=cap)
    except splat.IrregularPatternError:
        hypothesis.reject()


@pytest.mark.parametrize(
    ("text", "which", "several"),
    [
        ("neighborhood((3, 3, 4), (3, 3, 3))", "forward", False),
        ("random_blocks(3, 10, 0)", "d_key_value", False),
        ("random_blocks(3, 6, 0) | lattice_columns(5, 1)", "forward", True),
        ("(random_blocks(3, 6, 0) | lattice_columns(5, 1)).T", "d_key_value", True),
    ],
)
@pytest.mark.parametrize("lengths", [None, [33]])
def test_loops_over_walks(
    text: str, which: str, several: bool, lengths: list[int] | None, rng: np.random.Generator
) -> None:
    """More walks than are written out: strides from the text, or from a table where they differ."""
    length = 36 if "neighborhood" in text else 40
    plan = check(text, draw_inputs(rng, length, length, heads=(2, 1), head_dim=4), lengths=lengths)
    (one,) = getattr(plan, which).passes
    assert len(one.walks) > 6
    assert (len({walk.stride for walk in one.walks}) > 1) == several


def test_passes_with_row_maps(rng: np.random.Generator) -> None:
    """Few rows have everything: a pass over those alone, and one over all."""
    plan = check("window(4) | global_rows(3)", draw_inputs(rng, 70, 70))
    assert [one.tiles.row_map is None for one in plan.forward.passes] == [True, False]
    plan = check("global_rows(3)", draw_inputs(rng, 70, 70), lengths=[31])
    assert [one.tiles.row_map is None for one in plan.forward.passes] == [False]


def test_three_passes(rng: np.random.Generator) -> None:
    plan = check(MODELS["multi-scale"], draw_inputs(rng, 48, 48, heads=(2, 1)), lengths=[29])
    assert [len(walks(plan, which)) for which in ("forward", "d_query", "d_key_value")] == [3, 3, 3]


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1), (1, 40), (40, 1), (17, 50), (50, 17)])
@pytest.mark.parametrize("offset", [0, 11])
def test_rectangles(sizes: tuple[int, int], offset: int, rng: np.random.Generator) -> None:
    for text in (LOCAL, MERGED):
        check(text, draw_inputs(rng, *sizes), settings=dict(query_offset=offset))


@pytest.mark.parametrize("sizes", BLOCKS, ids=lambda sizes: f"{sizes[0]}x{sizes[1]}")
@pytest.mark.parametrize("options", [dict(), dict(DESCRIPTORS=True)], ids=["pointers", "descriptors"])
def test_blocks(sizes: tuple[int, int], options: dict[str, Any], rng: np.random.Generator) -> None:
    """Lengths that no block divides, and full tiles between the edges."""
    for text in ("causal()", LOCAL, MERGED, "dilated_window(20, 20, 3)", "strided(4)"):
        plan = check(text, draw_inputs(rng, 83, 83, heads=(1, 1), head_dim=16), settings=blocks(*sizes), **options)
        for which in ("forward", "d_query", "d_key_value"):
            assert {one.decision.block_kv for one in getattr(plan, which).passes} == {sizes[1]}


@pytest.mark.parametrize("head_dim", [1, 7, 16, 80])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_head_dims(head_dim: int, dtype: str, rng: np.random.Generator) -> None:
    for text in (LOCAL, MERGED):
        check(text, draw_inputs(rng, 30, 27, heads=(1, 1), head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [16, 40])
def test_descriptors(head_dim: int, dtype: str, rng: np.random.Generator) -> None:
    """Also where the head dim is padded, and where key lengths cut."""
    for lengths in (None, [0, 19]):
        inputs = draw_inputs(rng, 30, 27, heads=(1, 1), head_dim=head_dim, dtype=dtype, batch=2)
        check(MERGED, inputs, lengths=lengths, DESCRIPTORS=True)


@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (6, 2)])
@pytest.mark.parametrize("text", [LOCAL, MERGED])
def test_grouped_queries(heads: tuple[int, int], text: str, rng: np.random.Generator) -> None:
    check(text, draw_inputs(rng, 16, 16, heads=heads))
    check(text, draw_inputs(rng, 10, 16, heads=heads, batch=2), lengths=[11, 16])


@pytest.mark.parametrize(
    "layout", [Layout("BNTH"), Layout("TBNH"), Layout("NTBH"), Layout("BTNH", 8), Layout("BNTH", 3)], ids=str
)
@pytest.mark.parametrize("text", [LOCAL, MERGED, "sink(0)"])
def test_layouts(layout: Layout, text: str, rng: np.random.Generator) -> None:
    """Elements between rows are neither read nor written."""
    inputs = draw_inputs(rng, 9, 20, heads=(2, 2), batch=2)
    check(text, inputs, layout=layout)
    if layout.padding % 8 == 0:
        check(text, inputs, layout=layout, DESCRIPTORS=True)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(logits_soft_cap=1.5), dict(scale=0.0), dict(scale=-2.0), dict(scale=1.0, logits_soft_cap=30.0),
        dict(scale=0.0, logits_soft_cap=2.0), dict(scale=-1.0, logits_soft_cap=0.5),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("text", [LOCAL, MERGED])
def test_scores(options: dict[str, Any], text: str, rng: np.random.Generator) -> None:
    check(text, draw_inputs(rng, 30, 30, heads=(1, 1)), **options)


@pytest.mark.parametrize("text", ["full()", LOCAL, MERGED, "blocked(8, 1, 1)", "lattice_columns(4, 3)"])
@pytest.mark.parametrize("sizes", [(16, 16), (32, 16)])
def test_key_lengths(text: str, sizes: tuple[int, int], rng: np.random.Generator) -> None:
    """None, one, at and beside the edges of tiles, all and more keys than there are."""
    inputs = draw_inputs(rng, 20, 70, batch=7, heads=(1, 1), head_dim=4)
    check(text, inputs, settings=blocks(*sizes), lengths=[0, 1, 15, 17, 48, 70, 99])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("text", ["sink(3) | window(2)", "lattice_columns(5, 2)", "causal() & strided(4)", "sink(0)"])
@pytest.mark.parametrize("options", [dict(), dict(DESCRIPTORS=True)], ids=["pointers", "descriptors"])
def test_what_no_row_has_is_not_read(
    poison: float, text: str, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """Keys in no pair, and keys past the lengths; every key from the 30th on is one of them."""
    inputs = draw_inputs(rng, 12, 60, batch=2, heads=(1, 1))
    plan = plan_of(text, inputs)
    mask = plan.problem.pattern.to_dense(12, 60)
    for lengths in (None, [7, 30]):
        unseen = ~mask.any(axis=0) | (np.arange(60) >= np.array(lengths or [60, 60])[:, None])
        bad = [np.where(unseen[..., None, None], poison, x).astype(x.dtype) for x in (inputs.key, inputs.value)]
        found = attend(plan, inputs._replace(key=bad[0], value=bad[1]), lengths=lengths, **options)
        expected = truth(inputs, mask, kv_lengths=None if lengths is None else np.array(lengths))
        compare(found, expected, "float32")


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("lengths", [None, [21]])
def test_queries_without_keys_may_hold_anything(
    poison: float, lengths: list[int] | None, rng: np.random.Generator
) -> None:
    inputs = draw_inputs(rng, 30, 30)
    plan = plan_of("window(2) & segments([" + "0, " * 10 + "-1, " * 7 + "1, " * 13 + "])", inputs)
    mask = plan.problem.pattern.to_dense(30)
    assert plan.empty_rows == 7
    query = np.array(inputs.query)
    query[:, 10:17] = poison
    found = attend(plan, inputs._replace(query=query), lengths=lengths)
    compare(found, truth(inputs, mask, kv_lengths=None if lengths is None else np.array(lengths)), "float32")


@pytest.mark.parametrize("text", [MERGED, "neighborhood((3, 3, 4), (3, 3, 3))", "window(4) | global_rows(3)"])
def test_results_are_the_same_every_time(text: str, rng: np.random.Generator) -> None:
    inputs = draw_inputs(rng, 36, 36)
    run = functools.partial(attend, plan_of(text, inputs), inputs)
    for first, second in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(first, second)
