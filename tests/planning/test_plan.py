"""The plan: what it prints, compares and writes is what it does."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import splat
from splat import Plan
from splat.errors import ArgumentError, PatternError, UnsupportedError
from splat.planning import Problem, make_plan
from tests.strategies import Case, cases, more

BLOCKS = st.sampled_from([None, 4, 8, 64])


def plan_of(case: Case, **options: Any) -> Plan:
    return splat.plan(case.pattern, case.q_len, case.kv_len, query_offset=case.query_offset, **options)


@more(4)
@given(cases(), BLOCKS, BLOCKS, st.sampled_from([1, 8, 64, 80]), st.sampled_from(["float32", "bfloat16", "float64"]))
def test_numbers(case: Case, block_q: int | None, block_kv: int | None, head_dim: int, dtype: str) -> None:
    made = plan_of(
        case, batch=3, num_q_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype, block_q=block_q, block_kv=block_kv
    )
    mask = case.mask
    assert made.is_static
    assert made.nnz == mask.sum()
    assert made.density == mask.mean()
    assert made.empty_rows == (~mask.any(axis=1)).sum()
    assert made.flops == 4 * mask.sum() * head_dim * 4 * 3
    size = np.dtype(jnp.dtype(dtype)).itemsize
    elements = 2 * case.q_len * 3 * 4 + 2 * case.kv_len * 3 * 2
    assert made.bytes == size * elements * head_dim + 4 * 3 * 4 * case.q_len
    tiles = list(made.forward.each_tile())
    assert made.waste == (sum(keep.size for *_, keep in tiles) / mask.sum() if mask.any() else 1.0)
    np.testing.assert_array_equal(made.forward.to_dense(), mask)
    np.testing.assert_array_equal(made.d_key_value.to_dense(), mask.T)
    assert made.predicted_ms is not None
    assert made.predicted_ms >= 0


@more(4)
@given(cases(), BLOCKS, BLOCKS)
def test_json_round_trip(case: Case, block_q: int | None, block_kv: int | None) -> None:
    made = plan_of(case, block_q=block_q, block_kv=block_kv, num_q_heads=2)
    text = made.to_json()
    read = Plan.from_json(text)
    assert read == made
    assert hash(read) == hash(made)
    assert str(read) == str(made)
    assert read.to_json() == text
    assert read.digest == made.digest
    assert read.forward.decisions == made.forward.decisions
    assert read.d_key_value.decisions == made.d_key_value.decisions
    assert read.candidates == made.candidates
    np.testing.assert_array_equal(read.forward.to_dense(), case.mask)


def test_text_holds_the_facts() -> None:
    made = splat.plan(
        "causal() & window(16) | sink(2)",
        256,
        batch=2,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=32,
        block_q=32,
        block_kv=32,
    )
    lines = str(made).splitlines()
    mask = splat.parse("causal() & window(16) | sink(2)").to_dense(256)
    assert lines[0] == "plan of causal() & window(16) | sink(2)"
    assert lines[1] == "  q_len 256, kv_len 256, batch 2, heads 4/2, head dim 32, float32, on cpu"
    assert lines[2].startswith(f"  {mask.sum():,} non-zeros, density {mask.mean():.4%}, 0 empty rows, 2 components, ")
    assert lines[2].endswith("4.1 kB of metadata")
    passes = [f"  pass {n}: {one}" for n, one in enumerate(made.forward.passes)]
    assert lines[3 : 3 + len(passes)] == passes
    tiles = sum(one.num_tiles for one in made.forward.passes)
    assert f"  {tiles:,} tiles (" in lines[3 + len(passes)]
    assert f"waste {made.waste:.3f}" in lines[3 + len(passes)]
    assert "FLOP over non-zeros" in lines[3 + len(passes)]
    assert lines[4 + len(passes)] == f"  {made.savings}"
    candidates = lines[5 + len(passes) :]
    assert [line.split(":")[0].strip() for line in candidates] == ["triton", "cpp", "* xla"]
    assert candidates[2] == f"  * xla: {made.predicted_ms:.3g} ms predicted"
    assert "cannot serve: the triton implementation needs a GPU" in candidates[0]
    assert candidates[1].endswith(
        "cpp: no prediction; cannot serve: block_q must be 16 or None for implementation 'cpp', whose plans say what "
        "16 rows attend to column by column (its kernels choose their own tiles), but 32 was given. Leave it out."
    )


def test_text_of_a_plan_for_a_cpu() -> None:
    """What 16 rows attend to, column by column; both implementations predict."""
    made = splat.plan("causal() & window(16)", 256, num_q_heads=4, implementation="cpp")
    assert "  pass 0: components 0: 16 row tiles of 16 (step 1), 16 x 1 tiles, 496 tiles: 31 full" in str(made)
    xla = splat.plan("causal() & window(16)", 256, num_q_heads=4, implementation="xla").predicted_ms
    assert made.predicted_ms is not None
    assert xla is not None
    assert str(made).splitlines()[-2:] == [
        f"  * cpp: {made.predicted_ms:.3g} ms predicted",
        f"    xla: {xla:.3g} ms predicted",
    ]


def test_text_of_a_long_pattern_is_cut() -> None:
    pattern = splat.causal()
    for n in range(40):
        pattern = pattern & splat.window(100 + n)
    first = str(splat.plan(pattern, 300)).splitlines()[0]
    assert len(first) <= 208
    assert first.endswith("...")


def test_long_arrays_are_given_by_their_size() -> None:
    pattern = splat.from_mask(np.random.default_rng(0).permutation(splat.window(3).to_dense(300)))
    made = splat.plan(pattern, 300)
    assert str(made).splitlines()[0] == "plan of from_runs(<300 numbers>, [1], <300 numbers>, kv_len=300)"
    assert Plan.from_json(made.to_json()) == made
    assert "numbers" not in repr(pattern)


def test_runtime_plan() -> None:
    def check(ids: Any) -> None:
        made = splat.plan(splat.causal() & splat.segments(ids), 64)
        assert not made.is_static
        assert made.predicted_ms is None
        assert "run-time pattern: its numbers are known when it runs; no re-planning, no recompilation" in str(made)
        with pytest.raises(
            PatternError, match="a plan with run-time arrays cannot be written as JSON: its numbers are"
        ):
            made.to_json()
        assert made == made
        assert made != splat.plan(splat.causal() & splat.segments(ids), 64)
        assert isinstance(hash(made), int)

    jax.eval_shape(check, jnp.zeros(64, jnp.int32))


def test_traced_offset_makes_a_runtime_plan() -> None:
    def check(offset: Any) -> None:
        made = splat.plan("causal()", 8, 64, query_offset=offset)
        assert not made.is_static
        with pytest.raises(PatternError, match="cannot be written as JSON"):
            made.to_json()

    jax.eval_shape(check, jnp.int32(3))


def test_plans_are_values() -> None:
    a, b = (splat.plan(splat.causal() & splat.window(8), 64) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert {a: 1}[b] == 1
    different = [
        splat.plan(splat.causal() & splat.window(9), 64),
        splat.plan(splat.causal() & splat.window(8), 65),
        splat.plan(splat.causal() & splat.window(8), 64, 65),
        splat.plan(splat.causal() & splat.window(8), 64, head_dim=32),
        splat.plan(splat.causal() & splat.window(8), 64, num_q_heads=2),
        splat.plan(splat.causal() & splat.window(8), 64, batch=2),
        splat.plan(splat.causal() & splat.window(8), 64, dtype="bfloat16"),
        splat.plan(splat.causal() & splat.window(8), 64, query_offset=1),
        splat.plan(splat.causal() & splat.window(8), 64, query_offset=1 << 20),
        splat.plan(splat.causal() & splat.window(8), 64, target="h100"),
        splat.plan(splat.causal() & splat.window(8), 64, block_q=16),
    ]
    assert len({a, *different}) == 1 + len(different)
    assert all(a != other for other in different)
    assert a != "a plan"


def test_plans_of_equal_tables_at_other_positions_are_not_equal() -> None:
    assert splat.plan(splat.full(), 4, 8) != splat.plan(splat.full(), 4, 8, query_offset=5)


def test_offsets_have_hashes_of_their_own() -> None:
    """Decoding looks up as many plans as there are steps."""
    plans = [make_plan(Problem(splat.causal(), 1, 64), implementation="cpp", query_offset=at) for at in range(32)]
    assert len({hash(one) for one in plans}) == 32


def test_what_generators_make_of_a_plan_goes_with_it() -> None:
    made: list[str] = []
    plan = make_plan(Problem(splat.causal(), 33, 33), implementation="xla")
    for _ in range(2):
        assert plan.remembered("this", lambda: made.append("this") or 5) == 5
    assert made == ["this"]
    copy = dataclasses.replace(plan)
    assert copy == plan
    assert copy.remembered("this", lambda: 6) == 6
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert again.remembered("this", lambda: 7) == 7


def test_a_static_plan_is_made_once() -> None:
    problem = Problem(splat.causal() & splat.window(17), 77, 77)
    assert make_plan(problem, implementation="xla") is make_plan(problem, implementation="xla")


def test_arguments_in_all_forms() -> None:
    expected = splat.plan(splat.window(8), 64, dtype="bfloat16")
    assert splat.plan("window(8)", 64, dtype="bf16") == expected
    assert splat.plan("window(8)", 64, 64, dtype=jnp.bfloat16) == expected
    assert splat.plan("window(8)", 64, dtype=jnp.dtype("bfloat16"), num_kv_heads=1) == expected
    assert splat.plan("window(8)", 64, dtype="bfloat16", query_offset=np.int32(0)) == expected
    sizes: dict[str, Any] = dict(q_len=np.int64(64), kv_len=np.int32(64), head_dim=np.int64(64), batch=np.int8(1))
    numpy = splat.plan("window(8)", dtype="bfloat16", **sizes)
    assert numpy == expected
    assert numpy.to_json() == expected.to_json()
    blocks = splat.plan("window(8)", 64, implementation="xla", block_q=np.int64(32))  # type: ignore[arg-type]
    assert blocks.to_json() == splat.plan("window(8)", 64, implementation="xla", block_q=32).to_json()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(
            dict(pattern=3),
            ArgumentError,
            "pattern must be a splat pattern such as splat.causal() & splat.window(512), but int was given",
        ),
        (dict(pattern="windw(3)"), PatternError, "did you mean window?"),
        (dict(pattern=splat.per_head([splat.causal()])), ArgumentError, "plan each of per_head([...]).patterns"),
        (dict(q_len=-1), PatternError, "plan: q_len must be in [0, 1073741824], but -1 was given"),
        (dict(q_len=2.0), PatternError, "plan: q_len must be an int, but 2.0 of type float was given"),
        (dict(kv_len=0), PatternError, "plan: kv_len must be in [1, 1073741824], but 0 was given"),
        (dict(head_dim=0), PatternError, "plan: head_dim must be in [1, "),
        (dict(num_q_heads=0), PatternError, "plan: num_q_heads must be in [1, "),
        (dict(block_q=0), PatternError, "plan: block_q must be in [1, 65536], but 0 was given"),
        (dict(block_kv=-4), PatternError, "plan: block_kv must be in [1, 65536], but -4 was given"),
        (
            dict(target="tpu"),
            ArgumentError,
            "target must be one of 'cpu', 'a100', 'h100', 'h200', 'b200', 'mi300x', but 'tpu' was",
        ),
        (
            dict(implementation="cuda"),
            ArgumentError,
            "implementation must be None or one of 'triton', 'cpp', 'xla', but",
        ),
        (
            dict(implementation="cpp", target="h100"),
            UnsupportedError,
            "implementation='cpp' cannot serve this call: the cpp implementation is for CPUs, and this is for a gpu.",
        ),
        (dict(implementation="cpp", block_q=32), ArgumentError, "block_q must be 16 or None for implementation 'cpp'"),
        (dict(implementation="cpp", block_kv=8), ArgumentError, "block_kv must be 1 or None for implementation 'cpp'"),
        (
            dict(implementation="triton", target="h100", block_q=24),
            ArgumentError,
            "block_q must be a power of two, 16 or more, or None for implementation 'triton'",
        ),
        (dict(query_offset=2**30), PatternError, "plan: query_offset must be in [-1073741824, 1073741816], but"),
        (dict(implementation="triton"), UnsupportedError, "needs a GPU, and this is for a cpu"),
        (dict(dtype="float8_e4m3fn"), UnsupportedError, "not float8_e4m3fn. Convert the inputs."),
        (dict(pattern=splat.segments([0, 0])), PatternError, "ids name 2 positions, but the pattern is used up to"),
    ],
)
def test_refusals(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        splat.plan(**{"pattern": "causal()", "q_len": 8, **arguments})
    assert message in str(caught.value)


# -- JSON that was not written by this version -------------------------------------------------------------------------


def edited(change: Any) -> str:
    data = json.loads(splat.plan("causal() & window(8) | strided(4)", 64, implementation="xla").to_json())
    change(data)
    return json.dumps(data)


OTHER_TABLES = "this plan leads to other tables than when it was written (another version?). Plan again."


def test_edited_digest_is_refused() -> None:
    with pytest.raises(PatternError) as caught:
        Plan.from_json(edited(lambda data: data.update(digest="0" * 16)))
    assert str(caught.value) == OTHER_TABLES


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["problem"].update(pattern="causal() & window(9) | strided(4)"),
        lambda data: data["problem"].update(q_len=63),
        lambda data: data["problem"].update(kv_len=65),
        lambda data: data["problem"].update(dtype="foo"),
        lambda data: data.update(blocks=[8, None]),
        lambda data: data.update(query_offset=1),
        lambda data: data["passes"][0].update(block_q=8),
        lambda data: data["passes"][0].update(block_kv=8),
        lambda data: data["passes"][0].update(components=[]),
        lambda data: data["passes"].pop(),
        lambda data: data["passes"].reverse(),
    ],
)
def test_any_change_of_the_tables_is_refused(change: Any) -> None:
    with pytest.raises(PatternError) as caught:
        Plan.from_json(edited(change))
    assert str(caught.value) == OTHER_TABLES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this is not the JSON of a plan: "),
        ("{", "this is not the JSON of a plan: "),
        ("[]", "this is not the JSON of a plan: "),
        ("null", "this is not the JSON of a plan: "),
        ("{}", "this is not the JSON of a plan: KeyError('format')"),
        ('{"format": 2}', "this plan has format 2, but format 1 is read. Plan again."),
        (edited(lambda data: data.pop("digest")), "this is not the JSON of a plan: KeyError('digest')"),
        (edited(lambda data: data["problem"].update(more=1)), "this is not the JSON of a plan: "),
        (edited(lambda data: data["passes"][0].update(components=[7])), "there is no such pass over 3 components: "),
        (edited(lambda data: data["problem"].update(pattern="exit()")), "there is no pattern named 'exit'"),
    ],
)
def test_other_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(PatternError) as caught:
        Plan.from_json(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["problem"].update(q_len=-1),
        lambda data: data["problem"].update(q_len=10**12),
        lambda data: data["problem"].update(batch=-1),
        lambda data: data["problem"].update(head_dim="64"),
        lambda data: data.update(blocks=[8]),
        lambda data: data.update(blocks=["8", None]),
        lambda data: data.update(query_offset=2**31),
        lambda data: data.update(target="tpu"),
        lambda data: data.update(implementation="cuda"),
        lambda data: data["passes"][0].update(block_q=0),
        lambda data: data["passes"][0].update(step=None),
    ],
)
def test_values_that_no_plan_has_are_refused(change: Any) -> None:
    with pytest.raises(ArgumentError):
        Plan.from_json(edited(change))


def test_tile_sizes_that_one_implementation_lacks() -> None:
    """The best that can serve is another, and nothing is predicted for the one that cannot."""
    plan = splat.plan("causal()", 4096, target="h100", block_q=24, dtype="bfloat16")
    assert plan.implementation == "xla"
    (triton,) = (one for one in plan.candidates if one.implementation == "triton")
    assert triton.predicted_ms is None
    assert "block_q must be a power of two" in str(triton.refusal)


def test_json_is_readable() -> None:
    data = json.loads(splat.plan("window(8)", 64, num_q_heads=2).to_json())
    assert data["problem"] == dataclasses.asdict(Problem("window(8)", 64, 64, 64, 2, 2))  # type: ignore[arg-type]
    assert data["format"] == 1
    assert data["passes"][0]["components"] == [0]
    assert data["target"] == "cpu"
