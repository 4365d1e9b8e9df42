"""The paper's three operations by Triton kernels, interpreted on NumPy arrays and behind JAX, against float64.

All inputs have NaN in padding, and in rows and columns that are in no pair. `test_values_compiled.py` compiles the
same kernels for GPUs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import splat
from splat.acsr import ACSR, Component
from splat.codegen import base
from splat.codegen.base import USUAL, How
from splat.codegen.triton.launch import Launch
from splat.errors import ArgumentError, IrregularPatternError, UnsupportedError
from splat.planning.kernels import INTERPRETER, KernelConfig
from tests.attention_suite import MODELS, SPARSE_SUITE, VOCABULARY
from tests.strategies import Case, cases, fewer

pytest.importorskip("triton", reason="triton is not installed: the interpreted kernels are untested here")

from splat.codegen.triton import values
from splat.codegen.triton.emit import IMPLEMENTATION
from splat.codegen.triton.values import Operations
from splat.codegen.triton.values_lower import lower_sddmm, lower_spmm
from tests.codegen.triton import numpy_values
from tests.codegen.triton.numpy_values import OPERATIONS, TOLERANCE, Matrix, carry_out, check, draw, matrix, truth

#: Edges on one side and on both, full tiles, two components, strides, rows without columns.
LOCAL = "causal() & (sink(2) | window(20, 0))"
SEVERAL = "window(3) | strided(4)"
FEW = [
    LOCAL,
    SEVERAL,
    "dilated_window(9, 9, 3)",
    "window(2) & segments([" + "0, " * 20 + "-1, " * 9 + "1, " * 41 + "])",
]

CONFIGS = values.configs_of(INTERPRETER, "spmm", 64, "float32")

#: The paper's patterns and others, of a size to compile for.
SUITE = {
    "windowed": "window(512)",
    "blocked": "blocked(256, 1, 0)",
    "strided": "strided(8)",
    "OpenAI strided": "causal() & (window(512, 0) | strided(512))",
    "OpenAI fixed": "causal() & (blocked(256) | lattice_columns(256, 255))",
    "BigBird": "blocked(64, 1, 1) | random_blocks(64, 3, 0) | global_tokens(64)",
}


def by(block_q: int, block_kv: int) -> Operations:
    return dataclasses.replace(OPERATIONS, configs=(KernelConfig(block_q, block_kv, 4, 1),))


# -- patterns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*VOCABULARY, *SPARSE_SUITE.values(), *MODELS.values()], ids=lambda text: text[:32])
def test_patterns(text: str, rng: np.random.Generator) -> None:
    m = matrix(text, 40 if text in VOCABULARY else 48)
    check(m, *draw(rng, m, batch=1))


@fewer(2)
@given(cases(max_len=40, depth=2), st.sampled_from([(16, 16), (32, 16), (16, 32)]), st.integers(0, 2**16))
def test_composed_patterns(case: Case, blocks: tuple[int, int], seed: int) -> None:
    acsr = splat.build(case.pattern, case.q_len, case.kv_len, query_offset=case.query_offset)
    hypothesis.assume(acsr.nnz > 0)
    m = Matrix(acsr, case.mask)
    check(m, *draw(np.random.default_rng(seed), m, batch=1, head_dim=4), operations=by(*blocks))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 40), (40, 1), (17, 50), (70, 33)])
@pytest.mark.parametrize("text", FEW[:3])
def test_rectangles(text: str, sizes: tuple[int, int], rng: np.random.Generator) -> None:
    m = matrix(text, *sizes)
    check(m, *draw(rng, m))


@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 32), (64, 16)])
@pytest.mark.parametrize("text", FEW)
def test_blocks(text: str, blocks: tuple[int, int], rng: np.random.Generator) -> None:
    m = matrix(text, 70)
    check(m, *draw(rng, m, batch=1), operations=by(*blocks))


@pytest.mark.parametrize(
    ("arch", "head_dim", "dtype"), [("sm_90", 64, "bfloat16"), ("gfx942", 130, "float16"), ("sm_80", 72, "float32")]
)
def test_configurations_of_gpus(arch: str, head_dim: int, dtype: str, rng: np.random.Generator) -> None:
    """Their block sizes, on patterns with all phases."""
    for text in ("causal() & (window(60, 0) | strided(37))", "window(70)"):
        m = matrix(text, 300)
        rows, columns, given = draw(rng, m, batch=1, head_dim=head_dim, dtype=jax.numpy.dtype(dtype))
        expected = truth(m, rows, columns, given)
        for name, arrays in {
            "sddmm": (rows, columns),
            "spmm": (given, columns),
            "spmm_transposed": (given, rows),
        }.items():
            operations = dataclasses.replace(OPERATIONS, configs=values.configs_of(arch, name, head_dim, dtype))
            found = np.asarray(getattr(operations, name)(m.acsr, *arrays), np.float64)
            limit = TOLERANCE[dtype] * np.abs(expected[name]).max()
            np.testing.assert_allclose(found, expected[name], rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [1, 7, 16, 40])
def test_head_dims(head_dim: int, dtype: str, rng: np.random.Generator) -> None:
    for text in (LOCAL, SEVERAL):
        m = matrix(text, 30, 27)
        check(m, *draw(rng, m, head_dim=head_dim, dtype=jax.numpy.dtype(dtype)))


@pytest.mark.parametrize("text", FEW)
def test_wide_addresses(text: str, rng: np.random.Generator) -> None:
    """Offsets of 64 bits, as long arrays have them."""

    def launch(one: Launch) -> list[Any]:
        wide = {name: wide for name, wide in (("WIDE", True), ("PLACES", "far rows")) if name in one.constants}
        return carry_out(dataclasses.replace(one, constants=one.constants | wide))

    m = matrix(text, 70)
    check(m, *draw(rng, m, batch=1), operations=dataclasses.replace(OPERATIONS, launch=launch))


@pytest.mark.parametrize("stride", [1, 2])
def test_columns_that_are_not_regular(stride: int, rng: np.random.Generator) -> None:
    """Runs anywhere: seen from the columns, hundreds of them."""
    count = rng.integers(0, 20 // stride, 150).astype(np.int32)
    start = np.array([rng.integers(0, 24 - stride * max(n - 1, 0)) for n in count], np.int32)
    acsr = ACSR((150, 24), (Component(stride, start, count, 1 if stride == 1 else None),))
    (launch,) = lower_spmm(acsr, CONFIGS, True)
    assert launch.phases.left == "rows"
    m = Matrix(acsr, acsr.to_dense())
    check(m, *draw(rng, m))


def test_columns_that_cannot_be_transposed(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    def refuse(acsr: ACSR) -> ACSR:
        raise IrregularPatternError("no")

    monkeypatch.setattr(ACSR, "transpose", refuse)
    base._matrices.clear()
    for text in FEW:
        m = matrix(text, 70)
        check(m, *draw(rng, m, batch=1))
    base._matrices.clear()


# -- R-softmax ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["window(50, 70)", "causal() & (strided(2) | window(8))"])
def test_long_rows(text: str, rng: np.random.Generator) -> None:
    """More than a block of values a row, and scores of any size."""
    m = matrix(text, 150)
    assert m.acsr.width > 64
    rows, columns, scores = draw(rng, m)
    scores = scores * np.float32(1e4)
    found = OPERATIONS.softmax(m.acsr, scores)
    np.testing.assert_allclose(found, truth(m, rows, columns, scores)["softmax"], atol=1e-6)


@pytest.mark.parametrize("length", [40, 150])
def test_scores_of_minus_infinity(length: int) -> None:
    m = matrix("causal()", length)
    scores = np.full((1, length, m.acsr.width), -np.inf, np.float32)
    scores[0, 20, 3:5] = 2.0
    found = OPERATIONS.softmax(m.acsr, scores)
    assert found[0, 20, 3] == found[0, 20, 4] == 0.5
    assert found.sum() == 1.0


# -- behind JAX --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FEW[:2])
def test_implementation(text: str, rng: np.random.Generator) -> None:
    m = matrix(text, 30)
    check(m, *map(jax.numpy.asarray, draw(rng, m)), operations=IMPLEMENTATION)


def test_jit(rng: np.random.Generator) -> None:
    m = matrix(SEVERAL, 30)
    rows, columns, _ = draw(rng, m)

    @jax.jit
    def attention(rows: Any, columns: Any) -> Any:
        weights = IMPLEMENTATION.softmax(m.acsr, IMPLEMENTATION.sddmm(m.acsr, rows, columns))
        return IMPLEMENTATION.spmm(m.acsr, weights, columns)

    scores = truth(m, rows, columns, m.values_of(rows @ columns.swapaxes(1, 2)))["softmax"]
    expected = truth(m, rows, columns, scores)["spmm"]
    np.testing.assert_allclose(attention(rows, columns), expected, atol=1e-5)


def test_same_results_every_time(rng: np.random.Generator) -> None:
    m = matrix(SEVERAL, 40)
    rows, columns, given = draw(rng, m)
    for operation in (functools.partial(OPERATIONS.spmm, m.acsr, given, columns),
                      functools.partial(OPERATIONS.spmm_transposed, m.acsr, given, rows)):  # fmt: skip
        np.testing.assert_array_equal(operation(), operation())


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((1, 8, 4)), "serves float32, bfloat16, float16, not float64. Convert the inputs"),
        (np.ones((1, 8, 300), np.float32), "serves head dims up to 256, not 300. Use implementation='xla'."),
    ],
)
def test_refused(array: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        OPERATIONS.sddmm(matrix("window(2)", 8).acsr, array, array)


# -- layout "tiles" ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*VOCABULARY, *FEW], ids=lambda text: text[:32])
def test_tiles(text: str, rng: np.random.Generator) -> None:
    """Which are packed: no padding."""
    m = matrix(text, 40)
    check(m, *draw(rng, m), operations=numpy_values.by(How("tiles")))


def test_tiles_of_long_rows(rng: np.random.Generator) -> None:
    m = matrix("causal() & (strided(2) | window(8))", 150)
    assert m.acsr.row_nnz.max() > 64
    check(m, *draw(rng, m), operations=numpy_values.by(How("tiles")))


def test_number_of_values() -> None:
    acsr = matrix("causal()", 8).acsr
    assert IMPLEMENTATION.num_values(acsr, How()) == 64
    assert IMPLEMENTATION.num_values(acsr, How("tiles")) == 36
    # More than 2^31 in either layout; rows are counted from where each begins.
    long = ACSR((1 << 16, 1 << 16), splat.build(splat.full(), 1 << 16).components)
    assert IMPLEMENTATION.num_values(long, How()) == 1 << 32
    with pytest.raises(UnsupportedError, match=r"up to 2\*\*31 - 1 values .* has 4,294,967,296. Use layout 'rows'."):
        IMPLEMENTATION.num_values(long, How("tiles"))


def test_places_of_long_matrices() -> None:
    """What holds a value's place: 32 bits while they suffice."""
    acsr = splat.build(splat.window(4096, 0), 1 << 18)
    for layout, places in (("rows", "far rows"), ("tiles", "packed")):
        for operation in ("sddmm", "spmm", "spmm_transposed"):
            (one,) = values.launches(acsr, operation, how=dict(layout=layout))
            assert one.constants["PLACES"] == places
    (one,) = values.launches(acsr, "sddmm", how=dict(layout="tiles"))
    assert one.outputs[0].shape == (1, acsr.nnz)
    assert not one.constants["PADDED"]


# -- without specialisations -------------------------------------------------------------------------------------------

OFF = [("spans",), ("posets",), ("alignment",), ("spans", "posets"), ("spans", "posets", "alignment")]


@pytest.mark.parametrize("off", OFF, ids="-".join)
@pytest.mark.parametrize("text", [*FEW, "window(2) & lattice_columns(9)", "global_tokens(3) | dilated_window(2, 3, 4)"])
def test_without(text: str, off: tuple[str, ...], rng: np.random.Generator) -> None:
    m = matrix(text, 70)
    check(m, *draw(rng, m, batch=1), operations=numpy_values.by(How("rows", **dict.fromkeys(off, False))))


@fewer(4)
@given(
    cases(max_len=40, depth=2), st.sampled_from([(), *OFF]), st.sampled_from(["rows", "tiles"]), st.integers(0, 2**16)
)
def test_composed_patterns_other_ways(case: Case, off: tuple[str, ...], layout: str, seed: int) -> None:
    acsr = splat.build(case.pattern, case.q_len, case.kv_len, query_offset=case.query_offset)
    hypothesis.assume(acsr.nnz > 0)
    m, how = Matrix(acsr, case.mask), How(layout, **dict.fromkeys(off, False))
    check(m, *draw(np.random.default_rng(seed), m, batch=1, head_dim=4), operations=numpy_values.by(how))


def visited(text: str, how: How) -> tuple[Any, ...]:
    """Pairs that R-SDDMM, R-SpMM and the transposed one compute, of a matrix of 4,096 rows."""
    acsr, configs = splat.build(splat.parse(text), 4096), (KernelConfig(128, 32, 8, 2),)
    sddmm = lower_sddmm(acsr, configs, how)
    found = [(sddmm.tables[0][:, 6] - sddmm.tables[0][:, 3]).sum() * sddmm.config.block_q]
    for transposed in (False, True):
        total = 0
        for spmm in lower_spmm(acsr, configs, transposed, how):
            spans = spmm.tables[0][:, 1:].reshape(len(spmm.tables[0]), -1, 6)
            total += (spans[:, :, 3] - spans[:, :, 0]).sum() * spmm.config.block_q
        found.append(total)
    return tuple(int(n) for n in found)


def test_what_specialisations_save() -> None:
    every = 4096 * 4096
    assert visited("window(512)", How(spans=False)) == (every,) * 3
    assert visited("strided(8)", USUAL) == (every // 8,) * 3
    # Rows of one residue keep visiting their own lattice; neighbours see all columns between the first and the last.
    assert visited("strided(8)", How(spans=False)) == (every // 8,) * 3
    assert min(visited("strided(8)", How(alignment=False))) >= every * 0.99
    usual, fixed = visited("window(496)", USUAL), visited("window(496)", How(posets=False))
    assert all(a < b for a, b in zip(usual, fixed, strict=True))


def test_without_poset_tiling_every_tile_is_masked() -> None:
    acsr = splat.build(splat.parse("strided(8)"), 4096)
    for operation in ("sddmm", "spmm", "spmm_transposed"):
        (usual,), (fixed,) = (values.launches(acsr, operation, how=how) for how in ({}, {"posets": False}))
        assert (usual.constants["LEFT"], usual.constants["FULL"]) == ("absent", True)
        assert (fixed.constants["LEFT"], fixed.constants["FULL"]) == ("lower", False)


# -- what is launched --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SUITE.values(), ids=SUITE)
def test_launches(text: str) -> None:
    """Specialised to what the pattern has: no phase, stride or mask that no tile needs."""
    acsr = splat.build(splat.parse(text), 4096)
    seen = {}
    for operation in values.OPERATIONS:
        made = values.launches(acsr, operation, arch="sm_90", head_dim=64)
        seen[operation] = [one.constants for one in made]
        assert len(made) <= len(acsr.components)
    (sddmm,) = seen["sddmm"]
    assert sddmm["STRIDE"] == (acsr.components[0].stride if len({c.stride for c in acsr.components}) == 1 else 0)
    if len(acsr.components) == 1:
        whole = text.startswith(("blocked", "strided"))
        for operation in ("sddmm", "spmm", "spmm_transposed"):
            (found,) = seen[operation]
            assert (found["LEFT"] == found["RIGHT"] == "absent") == whole
            assert found["FULL"]
            assert not found["RAGGED"]


def test_tiles_fit_strided_patterns() -> None:
    """Transformation alignment: as many products as non-zeros."""
    acsr = splat.build(splat.parse("strided(8)"), 4096)
    configs = values.configs_of("sm_90", "sddmm", 64, "bfloat16")
    sddmm = lower_sddmm(acsr, configs)
    tasks = sddmm.tables[0]
    assert (tasks[:, 6] - tasks[:, 3]).sum() * sddmm.config.block_q == acsr.nnz
    for transposed in (False, True):
        (spmm,) = lower_spmm(acsr, configs, transposed)
        tiles = spmm.tables[0]
        assert (tiles[:, 4] - tiles[:, 1]).sum() * spmm.config.block_q == acsr.nnz


def test_source() -> None:
    acsr = splat.build(splat.parse(SEVERAL), 64)
    text = values.source(acsr, "spmm", arch="sm_90")
    assert text.startswith(f"# splat {splat.__version__}: Triton kernels of spmm\n# ACSR 64 x 64, 3 components")
    assert [text.count(f" STRIDE={stride},") for stride in (1, 4)] == [1, 1]
    assert "def splat_spmm(" in text
    assert "def add_products(" in text
    with pytest.raises(ArgumentError, match="operation must be one of sddmm, softmax, spmm, spmm_transposed, but 'a'"):
        values.source(acsr, "a")
