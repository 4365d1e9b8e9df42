"""Which target of the planning table JAX's default device is."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import Any

from splat.planning import TARGETS


@lru_cache(maxsize=1)
def device_target() -> str:
    """The target that is closest to JAX's default device: by name, else by what its kernels are compiled for."""
    import jax

    if jax.default_backend() == "cpu":
        return "cpu"
    device = jax.devices()[0]
    kind = device.device_kind.lower()
    for name in TARGETS:
        if name in kind:
            return name
    return nearest_target(str(getattr(device, "compute_capability", "")))


def platform_of(array: Any) -> str:
    """Where a call with this array runs: "cpu", "gpu", "tpu". Traced arrays follow JAX's default device."""
    import jax
    from jax.core import Tracer

    if not isinstance(array, Tracer):
        return next(iter(array.devices())).platform
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is None:
        return jax.default_backend()
    return chosen if isinstance(chosen, str) else chosen.platform


@lru_cache(maxsize=1)
def compute_capability() -> str | None:
    """Of the first GPU, such as "9.0" or "gfx942"; None where JAX sees none or does not say."""
    import jax

    with contextlib.suppress(RuntimeError):
        return str(getattr(jax.devices("gpu")[0], "compute_capability", "")) or None
    return None


def nearest_target(compute_capability: str) -> str:
    """By what kernels must be compiled for: "9.0" -> "h100". AMD devices have names such as "gfx942"."""
    if compute_capability.startswith("gfx"):
        return "mi300x"
    # 12.x, as far as kernels go, is a larger 8.x: no wgmma, no tcgen05, 99 KB of shared memory.
    return {"9": "h100", "10": "b200"}.get(compute_capability.partition(".")[0], "a100")
