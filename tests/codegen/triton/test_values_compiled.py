"""The operations on values, compiled for GPUs that are not there: products on tensor cores, nothing spilled."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from splat.codegen.triton.offline import Compiled, Job, compile_all

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.sampled(1 / 2),
]

#: The instructions that products should become.
TENSOR_CORE = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "mfma"}

#: Two components, all phases, rows that no tile size divides.
SINK = dict(pattern="causal() & (sink(32) | window(1000, 0))", length=8100)
STRIDED = dict(pattern="strided(8)", length=8192)

PRODUCTS = [
    *((arch, operation, 128, SINK) for arch in TENSOR_CORE for operation in ("sddmm", "spmm", "spmm_transposed")),
    ("sm_80", "spmm", 64, STRIDED),
    ("sm_90", "spmm_transposed", 64, STRIDED),
    ("sm_100", "sddmm", 64, STRIDED),
    ("gfx942", "spmm", 64, STRIDED),
]


def compiled(arch: str, operation: str, **arguments: Any) -> Compiled:
    """As jax-triton would specialise it."""
    job = Job("splat.codegen.triton.values:sample", dict(operation=operation, arch=arch, **arguments), arch, jax=True)
    (found,) = compile_all([job])
    assert isinstance(found, Compiled), found
    return found


@pytest.mark.parametrize(("arch", "operation", "head_dim", "pattern"), PRODUCTS)
def test_products(arch: str, operation: str, head_dim: int, pattern: dict[str, Any]) -> None:
    found = compiled(arch, operation, head_dim=head_dim, **pattern)
    assert found.problems() == []
    assert list(found.tensor_core) == [TENSOR_CORE[arch]]
    assert ("cp.async" in found.copies) == arch.startswith("sm")


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("operation", ["sddmm", "spmm", "spmm_transposed"])
def test_without_specialisations(operation: str, arch: str) -> None:
    how = dict(spans=False, posets=False, alignment=False)
    found = compiled(arch, operation, head_dim=64, how=how, pattern="causal() & strided(8)", length=8100)
    assert found.problems() == []
    assert list(found.tensor_core) == [TENSOR_CORE[arch]]


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("operation", ["sddmm", "softmax", "spmm", "spmm_transposed"])
def test_packed_values(operation: str, arch: str) -> None:
    found = compiled(arch, operation, head_dim=128, how=dict(layout="tiles"), **SINK)
    needs = operation != "softmax"
    assert found.problems(needs_tensor_core=needs) == []
    assert list(found.tensor_core) == [TENSOR_CORE[arch]] * needs


@pytest.mark.parametrize("operation", ["sddmm", "spmm", "spmm_transposed"])
def test_single_precision(operation: str) -> None:
    """Full precision: no tensor cores, which would round to tf32."""
    found = compiled("sm_90", operation, head_dim=64, dtype="float32", **SINK)
    assert found.problems(needs_tensor_core=False) == []
    assert not found.tensor_core


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_softmax(arch: str) -> None:
    assert compiled(arch, "softmax", **SINK).problems(needs_tensor_core=False) == []
