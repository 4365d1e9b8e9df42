"""Compiled kernels as JAX operations, through the XLA FFI.

Importing this module compiles nothing and touches no device.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from splat.codegen.base import Options
from splat.codegen.cpp import compiler
from splat.codegen.cpp.generate import KernelFacts, library_name, source
from splat.codegen.partitioning import vary_like
from splat.errors import UnsupportedError
from splat.locks import Lock

Array = Any

_lock = Lock()

#: Address of a library's entry -> the name that XLA knows it by.
_targets: dict[int, str] = {}


def prepare(facts: KernelFacts) -> str:
    """The name that XLA knows the kernel by; compiles, loads and registers it where that has not been done.

    Raises what `compiler.load` raises, and UnsupportedError where the library cannot be called by XLA.
    """
    return register(facts.kernel, library_name(facts), source(facts))


def register(kernel: str, name: str, text: str) -> str:
    """The name that XLA knows a translation unit's `splat_ffi` by; see `prepare`. `name` is for people."""
    library = compiler.load(name, text)
    try:
        entry = library.splat_ffi
    except AttributeError:
        raise UnsupportedError(
            "this jaxlib brings no headers of the XLA FFI (include/xla/ffi/api/c_api.h), so C++ kernels cannot be "
            "called from JAX. Reinstall jaxlib, or use implementation='xla'."
        ) from None
    address = ctypes.cast(entry, ctypes.c_void_p).value
    assert address is not None
    with _lock:
        if address not in _targets:
            # XLA refuses one name for two addresses. The library's path holds the digest of all that it was made from;
            # one path is loaded once, so that its digest names one address.
            digest = hashlib.sha256(f"{library._name}\n{text}".encode()).hexdigest()[:16]
            target = f"splat_{kernel}_{digest}"
            if target in _targets.values():
                target = f"{target}_{len(_targets)}"
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(entry), platform="cpu")
            _targets[address] = target
        return _targets[address]


def prepare_all(every: Iterable[KernelFacts]) -> None:
    """`prepare`, side by side: compilers use one processor each."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(prepare, every):
            pass


def call(
    facts: KernelFacts, options: Options, operands: Sequence[Array], results: Sequence[jax.ShapeDtypeStruct]
) -> list[Array]:
    """Runs a kernel. Operands and results are those of `include/splat/ffi.hpp`, in its order.

    Neither differentiable nor batchable: wrap what calls in `vmappable`, and that in `jax.custom_vjp`.

    Returns:
      the results, varying over the mesh axes that the operands vary over (inside shard_map).
    """
    run = jax.ffi.ffi_call(prepare(facts), tuple(results), vmap_method=None)
    operands = [vary_like(x, *operands) for x in operands]
    made = run(*operands, scale=np.float64(options.scale), soft_cap=np.float64(options.logits_soft_cap or 0.0))
    return [vary_like(x, *operands) for x in made]


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=...)` has to be given for a function with these kernels in it.

    JAX vouches for the stability of its own custom calls only. What is exported names kernels that this process has
    compiled: it runs here, and in a process that has called the same attention before. Only what has been traced is
    known: call the function first, or `jax.eval_shape` with the shapes that are exported.
    """
    import jax.export

    with _lock:
        return [jax.export.DisabledSafetyCheck.custom_call(name) for name in _targets.values()]


__all__ = ["call", "export_checks", "prepare", "prepare_all", "register"]
