"""The operations on values as JAX would launch them on a GPU, decoded from the lowered program."""

from __future__ import annotations

import re

import pytest

from tests.codegen.triton import lowering
from tests.codegen.triton.lowering import Report
from tests.codegen.triton.test_lowering import interpreter

pytest.importorskip("triton", reason="the `jax-cuda` extra is not installed")

BATCH = 3


@pytest.fixture(scope="module", params=["this", "python3.12"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    python = interpreter(request.param)
    cache = str(tmp_path_factory.mktemp("cache"))
    return lowering.report(python, "tests.codegen.triton.values_lowering", TRITON_CACHE_DIR=cache)


def test_nothing_failed(report: Report) -> None:
    assert not report.errors, "\n".join(f"{name}: {error}" for name, error in report.errors.items())
    assert len(report.calls) == 4


def test_calls_fit_their_kernels(report: Report) -> None:
    for name, calls in report.calls.items():
        for call in calls:
            assert call.mismatch() is None, name
            assert call.shared_bytes <= 163 << 10, name
            assert call.grid[0] % BATCH == 0, name
            assert call.grid[1:] == (1, 1), name


def test_launches(report: Report) -> None:
    """Components that want other row tiles get launches of their own, which add to the earlier ones' result."""
    once = ["splat_sddmm", "splat_softmax", "splat_spmm", "splat_spmm"]
    assert [call.name for call in report["window"]] == once
    assert [call.name for call in report["several"]] == [*once, *once[2:]]
    assert [call.results for call in report["several"]][2:] == [
        ("tensor<3x2048x64xf32>",),
        ("tensor<3x2048x64xbf16>",),
    ] * 2


def test_products_are_on_tensor_cores(report: Report) -> None:
    for name, instruction in {"window": "wgmma.mma_async", "several": "wgmma|mma.sync", "ampere": "mma.sync"}.items():
        for call in report[name]:
            if call.name != "splat_softmax":
                assert re.search(instruction, call.ptx), f"{name}: {call.name}"
    for call in report["float32"]:
        assert not re.search("mma.sync|wgmma", call.ptx), "full precision, unless tf32 is asked for"


def test_dense_arrays_are_not_read_one_by_one(report: Report) -> None:
    for call in report["window"]:
        assert not re.search(r"ld\.global(\.\w+)*\.b16\b", call.ptx), call.name
