"""The real kernels as JAX would launch them on a GPU, decoded from the lowered program, for each generation of JAX."""

from __future__ import annotations

import re

import pytest

from splat.planning.kernels import find_config
from tests.codegen.triton import lowering
from tests.codegen.triton.attention_lowering import LENGTH
from tests.codegen.triton.lowering import KernelCall, Report
from tests.codegen.triton.test_lowering import interpreter

pytest.importorskip("triton", reason="the `jax-cuda` extra is not installed")

MODULE = "tests.codegen.triton.attention_lowering"
MATRIX = ("splat_forward", "splat_d_query", "splat_d_key_value")
GRADIENTS = ["splat_forward", "splat_delta", "splat_d_query", "splat_d_key_value"]

#: Shared memory of a program on Hopper.
SHARED_BYTES = 227 << 10


@pytest.fixture(scope="module", params=["this", "python3.12"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    python = interpreter(request.param)
    return lowering.report(python, MODULE, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("cache")))


def names(calls: list[KernelCall]) -> list[str]:
    return [call.name for call in calls]


def kernels(report: Report) -> list[tuple[str, KernelCall]]:
    return [(name, call) for name, calls in report.calls.items() for call in calls]


def test_nothing_failed(report: Report) -> None:
    assert not report.errors, "\n".join(f"{name}: {error}" for name, error in report.errors.items())
    assert len(report.calls) >= 20


def test_calls_fit_their_kernels(report: Report) -> None:
    """Parameters, shared memory, warps, scratch memory for descriptors."""
    for name, call in kernels(report):
        assert call.mismatch() is None, name
        assert call.shared_bytes <= SHARED_BYTES, name
        assert call.num_warps in (4, 8), name
        assert call.grid[1:] == (1, 1), name


def test_matrix_products_are_on_tensor_cores(report: Report) -> None:
    for name, call in kernels(report):
        if call.name in MATRIX and name != "float32":
            # tf32 takes float32's tiles, which may have fewer rows than wgmma wants.
            instruction = "mma.sync|wgmma" if name == "tf32" else "mma.sync" if name == "ampere" else "wgmma.mma_async"
            assert re.search(instruction, call.ptx), f"{name}: {call.name}"
    for call in report["float32"]:
        assert not re.search("mma.sync|wgmma", call.ptx), "full precision, unless tf32 is asked for"


def test_elements_are_not_read_one_by_one(report: Report) -> None:
    """Compilers know how arrays are aligned, although jax-triton tells them nothing about scalars."""
    for name, call in kernels(report):
        if call.name in MATRIX and name not in ("float32", "tf32"):
            assert not re.search(r"ld\.global(\.\w+)*\.b16\b", call.ptx), f"{name}: {call.name}"


def test_descriptors_where_the_binding_has_them(report: Report) -> None:
    for call in report["gradients_window"]:
        if call.name in MATRIX:
            assert ("cp.async.bulk.tensor" in call.ptx) == report.about["supports_descriptors"]


def test_launches(report: Report) -> None:
    assert names(report["forward_window"]) == GRADIENTS[:1]
    assert sorted(names(report["gradients_window"])) == sorted(GRADIENTS)
    merged = names(report["gradients_merged"])
    assert [merged.count(name) for name in GRADIENTS] == [2, 1, 2, 2]
    assert "splat_merge" not in merged, "the last pass has every row, and merges the other's results"


@pytest.mark.parametrize(
    "name", ["gradients_window", "lengths", "runtime_offset", "runtime_segments", "float16", "score_mod"]
)
def test_one_launch_each(report: Report, name: str) -> None:
    assert sorted(names(report[name])) == sorted(GRADIENTS)


def test_grids(report: Report) -> None:
    """Row tiles of every head and batch entry; key tiles of every key head."""
    (forward,) = report["forward_window"]
    config = find_config("sm_90", "forward", 128, "bfloat16", 128, 128)
    assert (forward.num_warps, forward.grid[0]) == (config.num_warps, 4096 // 128 * 8 * 2)
    by_name = {call.name: call for call in report["gradients_window"]}
    assert by_name["splat_d_key_value"].grid[0] == 4096 // 128 * 2 * 2
    mapped = {call.name: call for call in report["vmap_of_gradients"]}
    assert {name: call.grid[0] for name, call in mapped.items()} == {
        name: 3 * call.grid[0] for name, call in by_name.items()
    }


def test_decoding_is_divided(report: Report) -> None:
    """16 heads and sequences on 132 multiprocessors: in parts of 8 tiles, whatever the position; gradients as ever."""
    assert sorted(names(report["decoding"])) == sorted([*GRADIENTS, "splat_merge"])
    grids = {call.name: call.grid[0] for call in report["decoding"]}
    assert grids["splat_forward"] == 16 * (LENGTH // (8 * 128))
    assert grids["splat_merge"] == grids["splat_d_query"] == 16


def test_loops_shards_and_exports(report: Report) -> None:
    assert sorted(set(names(report["scan_and_remat"]))) == sorted(GRADIENTS)
    assert names(report["shard_map"]).count("splat_d_key_value") == 2
    assert names(report["export"]) == ["splat_forward"]


def test_keys_and_values_are_not_copied_per_head(report: Report) -> None:
    (forward,) = report["forward_window"]
    assert forward.operands[1] == forward.operands[2] == "tensor<2x4096x2x128xbf16>"
