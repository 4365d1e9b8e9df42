"""Launches as JAX operations: `jax_triton.triton_call` on a GPU, a callback into the interpreter on the CPU.

Importing this module imports neither triton nor jax_triton and touches no device. Supported are jax-triton 0.3.1
(Python 3.11, jax 0.10, triton 3.6) and 0.4 (Python 3.12, jax 0.11, triton 3.6 to 3.8).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from splat.codegen.batching import vmappable
from splat.codegen.partitioning import vary_like
from splat.codegen.triton import interpret
from splat.codegen.triton.launch import Launch

Array = Any

_CACHE_VARIABLE = "TRITON_CACHE_DIR"

#: What kernels are compiled for where there is no GPU to ask; None asks the first GPU.
_COMPUTE_CAPABILITY: contextvars.ContextVar[int | None] = contextvars.ContextVar("compute_capability", default=None)


def missing() -> str | None:
    """One sentence that says what to install, or None if launches can be carried out. Imports nothing."""
    needed = {"triton": "triton"} if interpret.is_interpreted() else {"triton": "triton", "jax_triton": "jax-triton"}
    absent = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if not absent:
        return None
    verb = "is" if len(absent) == 1 else "are"
    return f"{' and '.join(absent)} {verb} not installed: `pip install splat-attention[jax-cuda]`."


@functools.cache
def _version(*packages: str) -> tuple[int, ...]:
    """Of the first of the packages that is installed; () where none is."""
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return tuple(int(number) for number in re.findall(r"\d+", importlib.metadata.version(package))[:3])
    return ()


def supports_descriptors() -> bool:
    """Whether kernels may make tensor descriptors on the device (TMA).

    They need scratch memory from the launcher: jax-triton 0.4.1 asks for it and JAX's CUDA plugin 0.11.1 gives it. With
    older ones the kernel would compile and read a bad pointer. The interpreter needs none.
    """
    if interpret.is_interpreted():
        return True
    plugin = _version("jax-cuda13-plugin", "jax-cuda12-plugin")
    return _version("jax-triton") >= (0, 4, 1) and min(plugin, _version("jaxlib")) >= (0, 11, 1)


@contextlib.contextmanager
def lowering_for(compute_capability: int) -> Iterator[None]:
    """Within it, kernels are compiled for a compute capability (90 is 9.0), so that no GPU is needed to lower for one.

    The capability becomes part of what is traced, so JAX's caches are emptied on the way in and out: this is for tests
    and for looking at kernels, not for a program's inner loop.

    >>> with lowering_for(90):
    ...     text = jax.jit(f).trace(x).lower(lowering_platforms=("cuda",)).as_text()  # doctest: +SKIP
    """
    token = _COMPUTE_CAPABILITY.set(compute_capability)
    jax.clear_caches()
    try:
        yield
    finally:
        _COMPUTE_CAPABILITY.reset(token)
        jax.clear_caches()


def lowering_capability() -> int | None:
    """What `lowering_for` asks for; None outside it, where kernels are compiled for the first GPU."""
    return _COMPUTE_CAPABILITY.get()


@functools.cache
def _jax_triton() -> ModuleType:
    """The module, imported without the mark it leaves: 0.3.1 empties TRITON_CACHE_DIR, 0.4.1 deletes it."""
    before = os.environ.get(_CACHE_VARIABLE)
    import jax_triton

    if before is None:
        os.environ.pop(_CACHE_VARIABLE, None)
    else:
        os.environ[_CACHE_VARIABLE] = before
    _restore_nvidia(jax_triton)
    return jax_triton


def _restore_nvidia(jax_triton: Any) -> None:
    """Gives jax-triton 0.4 the compiler for NVIDIA back that it does without beside triton 3.6.

    It imports the compiler together with a constant of triton 3.7, and where one is missing has stubs for both.
    The constant is for descriptors made on the host; kernels here make theirs on the device.
    """
    library = jax_triton.triton_lib
    if isinstance(getattr(library, "cb", None), SimpleNamespace):
        with contextlib.suppress(ImportError):  # a Triton for AMD only
            library.cb = importlib.import_module("triton.backends.nvidia.compiler")


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=...)` has to be given for a function with launches in it.

    JAX vouches for the stability of its own custom calls only. An exported function holds PTX, and runs where the same
    version of JAX and a GPU of the same or a later generation are.
    """
    import jax.export

    target = getattr(_jax_triton().triton_lib, "CUSTOM_CALL_TARGET_NAME", "triton_kernel_call")
    return [jax.export.DisabledSafetyCheck.custom_call(target)]


# -- launching ---------------------------------------------------------------------------------------------------------


def launch(launch: Launch) -> list[Array]:
    """Carries out a launch; all of it is static but the arrays' values.

    Args:
      launch: its arrays are JAX arrays, traced or not. Float scalars too small for a normal float32 become 0.

    Returns:
      the outputs, varying over the mesh axes that the inputs vary over (inside shard_map). A launch of no programs
      launches nothing; its outputs hold `interpret.poison`.

    Neither differentiable nor batchable: wrap what launches in `vmappable`, and that in `jax.custom_vjp`.
    """
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype)) for x in launch.outputs)
    if launch.programs == 0:
        results = [jnp.full(x.shape, interpret.poison(x.dtype), x.dtype) for x in shapes]
    elif interpret.is_interpreted():
        results = _call_back(launch, shapes)
    else:
        results = _triton_call(launch, shapes)
    return [vary_like(x, *launch.arrays) for x in results]


#: JAX hands a callback its operands as JAX arrays. Those above 100 KB it copies in the threads that callbacks occupy,
#: so that as many callbacks as threads would wait for one another for ever; smaller ones are there at once.
_PIECE_BYTES = 1 << 16


def _call_back(launch: Launch, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> list[Array]:
    layouts = [(x.shape, np.dtype(x.dtype)) for x in launch.arrays]
    static = dataclasses.replace(launch, arrays=())  # inside jit the arrays are tracers, not to be kept

    def run(pieces: list[list[Array]]) -> tuple[np.ndarray, ...]:
        arrays = (
            np.concatenate([np.asarray(piece) for piece in parts] or [np.empty(0, dtype)]).reshape(shape)
            for parts, (shape, dtype) in zip(pieces, layouts, strict=True)
        )
        return tuple(interpret.launch(dataclasses.replace(static, arrays=tuple(arrays))))

    return list(jax.pure_callback(run, shapes, [_pieces(x) for x in launch.arrays]))


def _pieces(array: Array) -> list[Array]:
    size = _PIECE_BYTES // array.dtype.itemsize
    flat = array.reshape(-1)
    return [flat[at : at + size] for at in range(0, flat.size, size)]


def _triton_call(launch: Launch, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> list[Array]:
    call = _jax_triton().triton_call
    modern = "out_type" in inspect.signature(call).parameters  # 0.4
    _check_constants(launch, call)
    outputs: dict[str, Any] = {"out_type" if modern else "out_shape": shapes}
    results = call(
        *launch.arrays,
        *(_scalar(value, modern) for value in launch.scalars),
        kernel=launch.kernel.function,
        name=launch.kernel.name,
        grid=(launch.programs,),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        compute_capability=_COMPUTE_CAPABILITY.get(),
        **outputs,
        **launch.constants,
    )
    return list(results)


def _scalar(value: int | float, modern: bool) -> int | float | np.float32:
    """A scalar that becomes int32, int64 or float32.

    0.3.1 makes float64 of Python's floats. 0.4.1 deprecates np.float32 and makes float32 of Python's floats, but for
    those that only a float64 holds or that are subnormal as float32.
    """
    if isinstance(value, int):
        return value
    single = np.float32(value)
    if abs(single) < np.finfo(np.float32).tiny:
        single = np.float32(0)
    return float(single) if modern else single


def _check_constants(launch: Launch, call: Callable[..., Any]) -> None:
    """A constant with the name of an option of `triton_call` would be taken for it, or clash inside it."""
    options = set(inspect.signature(call).parameters) | {"fn", "scalar_args", "out_shapes", "in_tree", "metaparams"}
    if clash := sorted(options & set(launch.constants)):
        raise ValueError(f"{launch.kernel.name}: jax_triton.triton_call keeps the names {', '.join(clash)} to itself")


__all__ = [
    "export_checks",
    "launch",
    "lowering_capability",
    "lowering_for",
    "missing",
    "supports_descriptors",
    "vary_like",
    "vmappable",
]
