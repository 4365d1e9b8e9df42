"""Operations on values: the suite for each implementation, and what is refused before anything is compiled."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import splat
from splat.codegen import base
from splat.codegen.cpp import compiler
from splat.errors import ArgumentError, PatternError, UnsupportedError
from splat.ops import values as operations
from splat.ops.values import without
from splat.remembered import Remembered
from tests.values_suite import ValuesSuite


@pytest.mark.sampled(1 / 2)
class TestXla(ValuesSuite):
    implementation = "xla"
    splits = False
    switches = False


@pytest.mark.skipif(compiler.missing() is not None, reason=f"nothing can be compiled here: {compiler.missing()}")
class TestCpp(ValuesSuite):
    implementation = "cpp"

    @pytest.mark.parametrize(
        ("text", "sizes", "dtype", "off"),
        [
            ("full()", (100, 900, 20), "float32", ()),
            ("full()", (100, 900, 20), "bfloat16", ()),
            ("full()", (100, 900, 20), "float32", ("posets", "spans")),
            ("full()", (20, 5000, 64), "float32", ()),
            ("strided(2)", (100, 2000, 20), "float32", ()),
            ("window(30, 400)", (900, 900, 20), "float32", ()),
            ("window(30, 400)", (900, 900, 20), "float32", ("posets",)),
        ],
    )
    def test_several_blocks(
        self, text: str, sizes: tuple[int, int, int], dtype: str, off: tuple[str, ...], rng: np.random.Generator
    ) -> None:
        """R-SpMM takes 384 columns of a lattice at once, 2,048 where they need not be brought together."""
        q_len, kv_len, head_dim = sizes
        with without(*off):
            self.check(splat.build(splat.parse(text), q_len, kv_len), rng, head_dim, dtype)


@pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="triton is not installed: its kernels are untested here"
)
@pytest.mark.sampled(1 / 3)
class TestTriton(ValuesSuite):
    """Interpreted."""

    implementation = "triton"
    splits = False
    dtypes = ("float32", "bfloat16", "float16")
    leading = (2,)
    switched_rows = 100


ACSR = splat.build(splat.window(2), 8)
ONES = np.ones((8, 4), np.float32)
BEYOND = splat.ACSR((8, 8), (dataclasses.replace(ACSR.components[0], count=np.full(8, 1 << 30, np.int32)),))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: splat.sddmm(ONES, ONES, splat.window(2)),  # pyright: ignore[reportArgumentType]
            ArgumentError,
            "acsr must be a splat.ACSR",
        ),
        (lambda: splat.sddmm(ONES[:7], ONES, ACSR), ArgumentError, r"query must have shape \[..., 8, head dim\]"),
        (lambda: splat.sddmm(ONES, ONES[:7], ACSR), ArgumentError, "key must have shape .* acsr has 8 columns"),
        (lambda: splat.sddmm(ONES, ONES[:, :3], ACSR), ArgumentError, "agree in dtype and head dim"),
        (lambda: splat.sddmm(ONES, jnp.ones((8, 4), "bfloat16"), ACSR), ArgumentError, "agree in dtype"),
        (lambda: splat.sddmm(ONES[0], ONES, ACSR), ArgumentError, "query must have shape"),
        (lambda: splat.sddmm(ONES, ONES, ACSR, layout="columns"), ArgumentError, "layout must be 'rows' or 'tiles'"),
        (lambda: splat.sddmm(np.ones((8, 4), np.int32), ONES, ACSR), UnsupportedError, "query must be one of float32"),
        (lambda: splat.spmm(ONES, ACSR, ONES), ArgumentError, r"values must have shape \[..., 8, 5\]"),
        (lambda: splat.softmax(ONES, ACSR), ArgumentError, r"values must have shape \[..., 8, 5\]"),
        (lambda: splat.spmm(np.ones((2, 8, 5)), ACSR, np.ones((3, 8, 4))), ArgumentError, "must broadcast"),
        (lambda: splat.spmm_transposed(np.ones((8, 5)), ACSR, ONES[:5]), ArgumentError, "acsr has 8 rows"),
        (lambda: splat.sddmm(ONES, ONES, ACSR, implementation="cuda"), ArgumentError, "implementation must be None"),
        (lambda: splat.sddmm(ONES, ONES, BEYOND), PatternError, "component 0 of this ACSR leaves the matrix of 8 x 8"),
    ],
)
def test_refused(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_run_time_numbers_are_refused() -> None:
    def run(offset):
        return splat.sddmm(ONES, ONES, splat.build(splat.causal(), 8, 8, offset))

    with pytest.raises(ArgumentError, match="acsr must have known numbers"):
        jax.jit(run)(3)


# -- what is remembered ------------------------------------------------------------------------------------------------


def use_all(acsr: splat.ACSR, implementation: str) -> None:
    x = np.ones((acsr.shape[0], 4), np.float32)
    values = splat.softmax(splat.sddmm(x, x, acsr, implementation=implementation), acsr, implementation=implementation)
    splat.spmm(values, acsr, x, implementation=implementation)
    splat.spmm_transposed(values, acsr, x, implementation=implementation)


def test_matrices_are_forgotten_with_all_that_was_made_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Remembered(entries=99, nbytes=3.5 * 16 * ACSR.metadata_bytes)
    monkeypatch.setattr(base, "_matrices", known)
    seen = []
    for n in range(5):
        acsr = splat.build(splat.window(n), 8)
        use_all(acsr, "xla")
        seen.append(weakref.ref(acsr))
        del acsr
    gc.collect()
    assert len(known) == 3
    assert [one() is None for one in seen] == [True, True, False, False, False]


def test_equal_matrices_are_one() -> None:
    """Built anew in every step, say."""
    traced = []
    for _ in range(2):
        acsr = splat.build(splat.window(3), 8)
        static = operations._Static(acsr, "xla", "", base.USUAL, (8, acsr.width))
        traced.append(operations._jitted("sddmm", static))
    assert traced[0] is traced[1]
