"""Every configuration of `splat.planning.kernels`, compiled for its architecture and looked at. No GPU is needed."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest

from splat.codegen.triton.offline import Compiled, Job, compile_all
from splat.planning.kernels import ARCHITECTURES, KERNELS, KernelConfig, find_config, kernel_configs

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.sampled(1 / 3),
]

FACTORY = "splat.codegen.triton.record:sample"
HEAD_DIMS = (64, 128, 256)

#: The instructions that products should become.
TENSOR_CORE = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "mfma"}

#: Where tensor memory descriptors are more than pointers.
WITH_TMA = ("sm_90", "sm_100")


def rows(dtype: str) -> list[Any]:
    return [
        pytest.param(
            arch, kernel, head_dim, config, id=f"{arch}-{kernel}-{head_dim}-{config.block_q}x{config.block_kv}"
        )
        for arch, kernel, head_dim in itertools.product(ARCHITECTURES, KERNELS, HEAD_DIMS)
        for config in kernel_configs(arch, kernel, head_dim, dtype)
    ]


def compiled(arch: str, **arguments: Any) -> Compiled:
    [found] = compile_all([Job(FACTORY, dict(arch=arch, **arguments), arch, name=arguments["kernel"])])
    assert isinstance(found, Compiled), found
    return found


def row(
    arch: str, kernel: str, head_dim: int, config: KernelConfig, dtype: str, num_kv_heads: int | None = None
) -> Compiled:
    return compiled(
        arch, kernel=kernel, head_dim=head_dim, dtype=dtype, block_q=config.block_q, block_kv=config.block_kv,
        num_warps=config.num_warps, num_stages=config.num_stages, descriptors=config.descriptors,
        num_kv_heads=num_kv_heads or (2 if config.grouped else None),
    )  # fmt: skip


@pytest.mark.parametrize(("arch", "kernel", "head_dim", "config"), rows("bfloat16"))
def test_sixteen_bits(arch: str, kernel: str, head_dim: int, config: KernelConfig) -> None:
    found = row(arch, kernel, head_dim, config, "bfloat16")
    assert found.problems(config.spilled_bytes) == []
    assert list(found.tensor_core) == ["mma.sync" if arch == "sm_100" and config.grouped else TENSOR_CORE[arch]]
    assert found.num_warps == config.num_warps
    assert ("tma" in found.copies) == (config.descriptors and arch in WITH_TMA)


@pytest.mark.parametrize(("arch", "kernel", "head_dim", "config"), rows("float32"))
def test_single_precision(arch: str, kernel: str, head_dim: int, config: KernelConfig) -> None:
    """At full precision: NVIDIA's tensor cores, which would round to tf32, are left out."""
    found = row(arch, kernel, head_dim, config, "float32")
    assert found.problems(config.spilled_bytes, needs_tensor_core=arch.startswith("gfx")) == []
    assert bool(found.tensor_core) == arch.startswith("gfx")


GROUPED = [
    pytest.param(*one.values, dtype, id=f"{one.id}-{dtype}")
    for dtype in ("bfloat16", "float32")
    for one in rows(dtype)
    if one.values[1] == "d_key_value" and one.values[3].grouped is None
]


@pytest.mark.parametrize(("arch", "kernel", "head_dim", "config", "dtype"), GROUPED)
def test_grouped_query_heads(arch: str, kernel: str, head_dim: int, config: KernelConfig, dtype: str) -> None:
    """A loop over the query heads of a key head, which is around all others."""
    found = row(arch, kernel, head_dim, config, dtype, num_kv_heads=2)
    assert found.problems(config.spilled_bytes, needs_tensor_core=dtype == "bfloat16") == []


def test_every_case_has_a_row() -> None:
    """And other tile sizes have a rule."""
    for arch in ARCHITECTURES:
        for kernel in KERNELS:
            for dtype in ("bfloat16", "float16", "float32"):
                for head_dim in (1, 64, 65, 80, 128, 129, 256):
                    assert all(kernel_configs(arch, kernel, head_dim, dtype, grouped) for grouped in (False, True))
                    (first, *_) = known = kernel_configs(arch, kernel, head_dim, dtype)
                    assert find_config(arch, kernel, head_dim, dtype, first.block_q, first.block_kv) == first
                    assert len({(one.block_q, one.block_kv) for one in known}) == len(known), "one row hides another"
                assert kernel_configs(arch, kernel, 257, dtype) == ()
            rule = find_config(arch, kernel, 128, "bfloat16", 16, 16)
            assert (rule.block_q, rule.block_kv, rule.num_warps) == (16, 16, 4)
    assert kernel_configs("", "forward", 64, "bfloat16") == ()


# -- patterns of many components ---------------------------------------------------------------------------------------

#: 13 components forward, 12 of the transpose; all of them share the tiles of others.
MANY = "random_blocks(64, 12, 0)"


@pytest.mark.parametrize("kernel", ["forward", "d_key_value"])
def test_many_components_compile_in_seconds(kernel: str) -> None:
    """A loop over walks, not a text that grows with them; what it spills is known."""
    found = compiled("sm_90", kernel=kernel, pattern=MANY, q_len=4096)
    assert found.seconds < 15
    assert "wgmma" in found.tensor_core
    assert found.shared_bytes <= 227 << 10
