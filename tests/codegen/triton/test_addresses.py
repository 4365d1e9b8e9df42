"""Arrays of more than 2^31 elements, grids of more than 65,535 programs, without the memory or the time for them."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import splat
from splat.codegen.base import Options
from splat.codegen.triton import interpret, record
from splat.codegen.triton.launch import Launch
from splat.planning import Problem, make_plan
from tests.attention_suite import compare, draw_inputs, truth

pytest.importorskip("triton", reason="triton is not installed: the interpreted kernels are untested here")

from tests.codegen.triton.numpy_attention import Array, Layout, attend, check, plan_of

#: Elements from one position to the next: 2^31 of them after 32 positions.
STEP = 1 << 26


def sparse(shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros that take memory only where they are touched."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
    return np.frombuffer(memory, dtype).reshape(shape)


class Far(Layout):
    """[B, T, N, H] with `padding` elements between rows that exist as addresses only."""

    def put(self, x: Any) -> Array:
        x = np.asarray(x)
        made = sparse((*x.shape[:-1], x.shape[-1] + self.padding), x.dtype)
        made[..., : x.shape[-1]] = x
        return made

    def take(self, x: Array) -> Array:
        return x[..., : x.shape[-1] - self.padding]


def unguarded(launch: Launch) -> Sequence[Array]:
    """On the arrays themselves: copies between guards would take gigabytes."""
    outputs = [sparse(x.shape, x.dtype) for x in launch.outputs]
    interpret._run(launch, launch.arrays, outputs)
    return outputs


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="this system maps no memory that is not there")
@pytest.mark.parametrize(
    "text",
    [
        "causal() & (sink(2) | window(9, 0))",
        "window(3) | strided(4)",
        "window(2) | strided(33)",  # a stride that is itself past 2^31 elements
        "window(3) | lattice_columns(5, 1) | lattice_columns(7, 3)",  # strides from a table
        "(window(3) | lattice_columns(5, 1) | lattice_columns(7, 3)).T",
    ],
)
@pytest.mark.parametrize("options", [dict(), dict(DESCRIPTORS=True)], ids=["pointers", "descriptors"])
def test_elements_past_2_to_the_31(text: str, options: dict[str, Any], rng: np.random.Generator) -> None:
    """40 positions, 5.4 GB apart from first to last; the interpreter refuses int32 sums that overflow."""
    inputs = draw_inputs(rng, 40, 40, heads=(1, 1), head_dim=16, dtype="float16")
    plan = plan_of(text, inputs)
    seen: list[Launch] = []

    def launch(one: Launch) -> Sequence[Array]:
        seen.append(one)
        return unguarded(one)

    found = attend(plan, inputs, layout=Far(padding=STEP - 16), launch=launch, **options)
    compare(found, truth(inputs, plan.problem.pattern.to_dense(40)), "float16")
    assert {one.constants["WIDE"] for one in seen if "WIDE" in one.constants} == {True}


@pytest.mark.parametrize("text", ["causal() & (sink(2) | window(9, 0))", "window(3) | strided(4)"])
def test_wide_offsets(text: str, rng: np.random.Generator) -> None:
    check(text, draw_inputs(rng, 40, 37), WIDE=True)


def launches(q_len: int, *, heads: int = 1, head_dim: int = 128, batch: int = 1, **changes: Any) -> list[Launch]:
    pattern = splat.causal() & splat.window(64)
    problem = Problem(pattern, q_len, q_len, head_dim, heads, heads, batch, "bfloat16")
    plan = make_plan(problem, implementation="triton", target="h100")
    return record.launches(plan, Options(1.0), **changes)


@pytest.mark.parametrize(
    ("q_len", "heads", "wide"),
    [(1 << 13, 16, False), ((1 << 18) - 1, 64, False), (1 << 18, 64, True), (1 << 20, 32, True)],
)
def test_offsets_are_wide_where_they_have_to_be(q_len: int, heads: int, wide: bool) -> None:
    """From 2^31 elements between a head's first and last position on."""
    assert {one.constants["WIDE"] for one in launches(q_len, heads=heads) if "WIDE" in one.constants} == {wide}


def test_grids_have_one_axis() -> None:
    """The other axes end at 65,535 programs."""
    made = launches(1 << 15, heads=32, batch=64)
    assert {one.kernel.name for one in made} == {"splat_forward", "splat_delta", "splat_d_query", "splat_d_key_value"}
    for one in made:
        tile = one.constants["BLOCK" if one.kernel.name == "splat_delta" else "BLOCK_Q"]
        assert one.programs == (1 << 15) // tile * 32 * 64 > 2 * 65_535


def test_strides_come_in_units() -> None:
    """So that they fit 32 bits for a while longer, and what is left over is known to be a multiple of 16."""
    (one, *_) = launches(1 << 20, heads=64, batch=2)
    unit = one.constants["UNIT"]
    assert unit == 16
    assert one.scalars[0] * unit == (1 << 20) * 64 * 128
    assert one.scalars[0] < 1 << 31
    for scalar in one.scalars:
        assert isinstance(scalar, int | float)
    assert dataclasses.replace(one).constants["Q_T"] == 64 * 128
