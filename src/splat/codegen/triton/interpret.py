"""A launch on NumPy arrays: Triton's interpreter, without torch and without a GPU.

The interpreter runs a kernel's Python over NumPy, one program after another. `TRITON_INTERPRET=1` has to be set before
`triton` is first imported, since `triton.jit` decides when it decorates. What a GPU would get wrong silently is made
loud here: outputs start as NaN, every array lies between guard zones, and an int32 sum that overflows is an error.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from splat.codegen.triton.launch import Launch

#: Bytes before and behind each array: more than a tile of rows, so that an address past the end lands in them.
GUARD_BYTES = 1 << 16

_ALIGNMENT = 64  # as JAX's own buffers on the CPU; descriptors need 16

_TRITON_NAMES = {
    "bool": "int1",
    "int8": "int8",
    "uint8": "uint8",
    "int16": "int16",
    "uint16": "uint16",
    "int32": "int32",
    "uint32": "uint32",
    "int64": "int64",
    "uint64": "uint64",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "float64": "float64",
}

#: The interpreter's state (the current program, the patched `triton.language`) is global; JAX calls back from threads.
_LOCK = threading.RLock()


def is_interpreted() -> bool:
    """Whether `triton.jit` makes interpreted functions in this process. Does not import triton."""
    knobs: Any = sys.modules.get("triton.knobs")
    if knobs is not None:
        return bool(knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "yes", "on", "y"}


def poison(dtype: Any) -> Any:
    """What fills an array that nothing has been written to: NaN, the most negative int, or the largest unsigned."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return True
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return limits.min if dtype.kind == "i" else limits.max
    return float("nan")


def launch(launch: Launch) -> list[np.ndarray]:
    """Carries out a launch.

    Args:
      launch: its arrays are NumPy arrays (`ml_dtypes.bfloat16` included) or what `numpy.asarray` takes; each is copied
        between guard zones, so that none can be written to.

    Returns:
      the outputs. What the kernel did not write is `poison`.

    Raises:
      RuntimeError: the kernel was decorated without TRITON_INTERPRET=1, or it wrote outside its outputs.
      triton.runtime.errors.InterpreterError: what the kernel raised, an int32 overflow for one.
    """
    given = [np.asarray(x) for x in launch.arrays]
    inputs = [_Guarded.input(x) for x in given]
    outputs = [_Guarded.output(x.shape, _dtype(x.dtype)) for x in launch.outputs]
    if launch.programs:
        with _LOCK:
            _run(launch, [x.array for x in inputs], [x.array for x in outputs])
    for n, (guarded, original) in enumerate(zip(inputs, given, strict=True)):
        guarded.check_input(f"input {n} of {launch.kernel.name}", original)
    for n, guarded in enumerate(outputs):
        guarded.check_output(f"output {n} of {launch.kernel.name}")
    return [guarded.array for guarded in outputs]


def _run(launch: Launch, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
    """Runs every program, with `triton.language` computing on NumPy meanwhile."""
    from triton.runtime import interpreter
    from triton.runtime.errors import InterpreterError

    repair()
    function: Any = launch.kernel.function
    if not isinstance(function, interpreter.InterpretedFunction):
        raise RuntimeError(
            f"{launch.kernel.name} is a compiled kernel. Set TRITON_INTERPRET=1 before triton is first imported."
        )
    positional = [*map(_pointer, inputs), *map(_scalar, launch.scalars), *map(_pointer, outputs)]
    body: Any = function.rewrite()
    builder = interpreter.interpreter_builder
    scope = interpreter._patch_lang(body)
    try:
        builder.set_grid_dim(launch.programs, 1, 1)
        # Infinities and NaN are a kernel's business; NumPy would warn of them.
        with np.errstate(all="ignore"):
            for program in range(launch.programs):
                builder.set_grid_idx(program, 0, 0)
                try:
                    body(*positional, **launch.constants)
                except Exception as error:
                    where = f"{launch.kernel.name}, program {program} of {launch.programs}"
                    raise InterpreterError(f"{where}: {error!r}") from error
    finally:
        scope.restore()


def _pointer(array: np.ndarray) -> Any:
    """The kernel's view of an array: its address, as a scalar of a pointer type."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    kind = tl.pointer_type(getattr(tl, _TRITON_NAMES[array.dtype.name]))
    return tl.tensor(TensorHandle(np.array([array.ctypes.data], np.uint64), kind), kind)


def _scalar(value: int | float) -> Any:
    """A scalar as the compiler would type it: 1 is a compile-time constant, floats are float32."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if value == 1:
        return 1
    if isinstance(value, float):
        kind, held = tl.float32, np.float32
    elif -(2**31) <= value < 2**31:
        kind, held = tl.int32, np.int32
    else:
        kind, held = tl.int64, np.int64
    return tl.tensor(TensorHandle(np.array([value], held), kind), kind)


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


class _Guarded:
    """An array in the middle of a larger one.

        | guard | array | guard |

    Guards of inputs hold poison, so that what is read there shows. Those of outputs hold bits that no computation gives
    (a NaN of another kind, or -1), so that what is written there shows, poison included.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        size = math.prod(shape) * dtype.itemsize
        raw = np.empty(size + 2 * GUARD_BYTES + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        stop = start + GUARD_BYTES + size
        self._guards = [raw[start : start + GUARD_BYTES], raw[stop : stop + GUARD_BYTES]]
        self.array = raw[start + GUARD_BYTES : stop].view(dtype).reshape(shape)

    @classmethod
    def input(cls, array: np.ndarray) -> _Guarded:
        made = cls(array.shape, array.dtype)
        made.array[...] = array
        for guard in made._guards:
            guard.view(array.dtype).fill(poison(array.dtype))
        return made

    @classmethod
    def output(cls, shape: tuple[int, ...], dtype: np.dtype) -> _Guarded:
        made = cls(shape, dtype)
        made.array.fill(poison(dtype))
        for guard in made._guards:
            guard.fill(0xFF)
        return made

    def check_input(self, name: str, original: np.ndarray) -> None:
        if self.array.tobytes() != original.tobytes():
            raise RuntimeError(f"the kernel wrote to {name}")

    def check_output(self, name: str) -> None:
        for guard, side in zip(self._guards, ("before the start", "past the end"), strict=True):
            if (guard != 0xFF).any():
                raise RuntimeError(f"the kernel wrote {side} of {name}")


# -- what the interpreter gets wrong -----------------------------------------------------------------------------------


def repair() -> None:
    """Mends Triton's interpreter in this process (3.6, 3.7); a second call does nothing.

    - bfloat16 is stored as its bits, and `tl.dot`, arithmetic and casts would compute with those bits or truncate.
    - float16 `tl.dot` would run without BLAS.
    - numpy 2.4 refuses `int` of a one-element array, so that no loop bound could be a run-time value (Triton 3.6).
    - each call of one jit function by another would patch the whole language again, a millisecond every time.
    - integer overflow is looked for through the language itself, which takes longer than all the rest.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.interpreter_builder
    if getattr(builder, "splat_repaired", False):
        return
    builder.splat_repaired = True
    original = {name: getattr(builder, name) for name in ("create_dot", "cast_impl", "create_fp_to_fp", "binary_op")}
    handle: Any = interpreter.TensorHandle

    def widened(x: Any) -> Any:
        """bfloat16 and float16 as float32, which holds them exactly; anything else as it is."""
        if x.dtype.scalar == tl.bfloat16:
            return handle(_float32_of_bits(x.data), tl.float32)
        if x.dtype.scalar == tl.float16:
            return handle(x.data.astype(np.float32), tl.float32)
        return x

    def create_dot(a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return original["create_dot"](widened(a), widened(b), d, *rest)

    def cast_impl(x: Any, kind: Any) -> Any:
        source, target = x.dtype.scalar, kind.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            return original["cast_impl"](widened(x), kind)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return handle(_bits_of_float32(x.data.astype(np.float32)), tl.bfloat16)
        return original["cast_impl"](x, kind)

    def create_fp_to_fp(x: Any, kind: Any, rounding: Any) -> Any:
        if rounding is None or rounding == interpreter._ir.ROUNDING_MODE.RTNE:
            pair = {x.dtype.scalar, kind.scalar}
            if pair <= {tl.bfloat16, tl.float16, tl.float32, tl.float64}:
                return cast_impl(x, kind)
        return original["create_fp_to_fp"](x, kind, rounding)

    def binary_op(lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16:
            return original["binary_op"](lhs, rhs, op)
        result = op(widened(lhs).data, widened(rhs).data)
        return handle(result if result.dtype == bool else _bits_of_float32(result), tl.bfloat16)

    for replacement in (create_dot, cast_impl, create_fp_to_fp, binary_op):
        setattr(builder, replacement.__name__, replacement)

    class Semantic(interpreter.TritonSemantic):
        def binary_op_sanitize_overflow_impl(self, lhs: Any, rhs: Any, binary_op: Any) -> None:
            _check_overflow(lhs.handle.data, rhs.handle.data, binary_op.__name__)

    interpreter.TritonSemantic = Semantic
    interpreter.interpreter_semantic = Semantic(builder)

    patch_lang = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        if hasattr(tl, "splat_patched"):
            return interpreter._LangPatchScope()
        scope = patch_lang(_Everything)
        scope.set_attr(tl, "splat_patched", True)
        scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
        return scope

    class _Everything:  # a function that uses all of the language, as far as `_patch_lang` looks
        __globals__ = {"tl": tl, "core": tl.core}  # noqa: RUF012

    interpreter._patch_lang = patch_once


def _check_overflow(lhs: np.ndarray, rhs: np.ndarray, name: str) -> None:
    """Raises where `lhs name rhs` leaves its type; 64 bits are not looked at."""
    if lhs.dtype.kind not in "iu" or lhs.dtype.itemsize == 8:
        return
    operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    exact, limits = operation(lhs, rhs, dtype=np.int64), np.iinfo(lhs.dtype)
    if exact.size and (exact.max() > limits.max or exact.min() < limits.min):
        raise OverflowError(f"{lhs.dtype} overflow in {name}: {exact.min()} to {exact.max()}")


def _float32_of_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bits_of_float32(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 values: round to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


__all__ = ["GUARD_BYTES", "is_interpreted", "launch", "poison", "repair"]
