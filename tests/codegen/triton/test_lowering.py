"""What JAX would send to a GPU: every transformation's program, decoded, in each supported environment.

The interpreters are this one and, for the other generation of JAX, the one that SPLAT_TEST_PYTHON312 names: a Python
3.12 with this package and its extra `jax-cuda`. No GPU is needed, only JAX's CUDA plugin.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the `jax-cuda` extra is not installed")

from tests.codegen.triton import lowering
from tests.codegen.triton.lowering import Report


def _here(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def interpreter(name: str) -> str:
    """The Python of "this" or of "python3.12"; skips where it is missing or lacks what lowering needs."""
    if name == "python3.12":
        python = os.environ.get("SPLAT_TEST_PYTHON312", "")
        if not python:
            pytest.skip("SPLAT_TEST_PYTHON312 names no Python 3.12 with the `jax-cuda` extra")
        return python
    if not _here("jax_triton") or not (_here("jax_cuda13_plugin") or _here("jax_cuda12_plugin")):
        pytest.skip("jax-triton or JAX's CUDA plugin is not installed")
    return sys.executable


@pytest.fixture(scope="module", params=["this", "python3.12"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    python = interpreter(request.param)
    return lowering.report(python, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("cache")))


def test_nothing_failed(report: Report) -> None:
    assert not report.errors, "\n".join(f"{name}: {error}" for name, error in report.errors.items())
    assert report.calls.keys() == lowering.CASES.keys()


def test_environment_is_left_alone(report: Report) -> None:
    assert Path(report.about["cache_dir"]).name.startswith("cache")


@pytest.mark.parametrize("name", [name for name in lowering.CASES if name != "descriptors"])
def test_parameters_fit_the_kernel(report: Report, name: str) -> None:
    """Arrays, scalars and outputs reach the kernel's parameters, in this order and with these types."""
    for call in report[name]:
        assert call.mismatch() is None
        assert call.name == "product_kernel"
        assert call.num_warps == 4
        assert 0 < call.shared_bytes < 20_000
        assert "mma.sync" in call.ptx


def test_jit(report: Report) -> None:
    (call,) = report["jit"]
    assert call.grid == (2 * 3, 1, 1)
    pointers = [("array", None)]
    assert list(call.parameters) == [*pointers * 3, ("i32", 40), ("f32", 0.5), *pointers * 2]
    assert call.operands == ("tensor<2x40x64xbf16>", "tensor<2x64x64xbf16>", "tensor<40xi32>")
    assert call.results == ("tensor<2x40x64xbf16>", "tensor<2x40xf32>")
    assert call.compute_capability == 90
    assert ".target sm_90" in call.ptx


def test_another_generation(report: Report) -> None:
    (call,) = report["ampere"]
    assert call.compute_capability == 80
    assert ".target sm_80" in call.ptx


def test_traces_are_not_reused(report: Report) -> None:
    (call,) = report["traced_before"]
    assert call.compute_capability == 90


def test_scalars(report: Report) -> None:
    """1 is compiled in; a subnormal float is 0, never a float64."""
    assert [kind for kind, _ in report["scale_one"][0].parameters if kind != "array"] == ["i32"]
    assert ("f32", 0.0) in report["tiny_scale"][0].parameters


def test_descriptors_bring_scratch_memory(report: Report) -> None:
    """Where the launcher cannot, `supports_descriptors` says so."""
    (call,) = report["descriptors"]
    assert "tensormap" in call.ptx
    assert (call.mismatch() is None) == report.about["supports_descriptors"]
    assert (call.scratch_bytes == 128) == report.about["supports_descriptors"]


def test_vmap_folds_into_the_batch(report: Report) -> None:
    (call,) = report["vmap"]
    assert call.grid == (3 * 2 * 3, 1, 1)
    assert call.operands[0] == "tensor<6x40x64xbf16>"
    assert [call.grid[0] for call in report["vmap_of_grad"]] == [18, 18]


def test_vmap_over_tables_is_a_loop(report: Report) -> None:
    (call,) = report["vmap_of_tables"]
    assert call.grid == (6, 1, 1)


def test_loops_and_shards_hold_one_call_each(report: Report) -> None:
    assert len(report["scan"]) == 1
    assert [len(report[name]) for name in ("grad", "remat", "shard_map")] == [2, 2, 2]


def test_export(report: Report) -> None:
    (call,) = report["export"]
    assert report.about["export_checks"] == [call.target]


@pytest.mark.parametrize("name", ["this", "python3.12"])
def test_beside_triton_3_6(name: str) -> None:
    """jax-triton 0.4 imports a constant that 3.6 lacks."""
    report = lowering.report(interpreter(name), "tests.codegen.triton.lowering_beside_3_6", "jit", "descriptors")
    assert not report.errors, "\n".join(report.errors.values())
    assert ".target sm_90" in report["jit"][0].ptx
