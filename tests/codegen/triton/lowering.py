"""What JAX would send to a GPU, read on a machine without one.

Lowering cannot happen in an interpreted process, and tests are one, so `report` runs a module like this as a program:

    python -m tests.codegen.triton.lowering [CASE...]

That prints a JSON line about the environment, and one for each case: the kernel calls of a lowered program, or why
there are none. The compiler may abort the process: then the lines of later cases are missing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import struct
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from splat.codegen.triton import bind_jax
from tests.codegen.triton.product import Program, loss, product, shapes

# -- kernel calls ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """One Triton custom call of a lowered program.

    Attributes:
      target: the custom call's name, by which JAX finds the launcher.
      name: of the kernel.
      grid: programs along each axis.
      scratch_bytes: of device memory for each program, for descriptors.
      parameters: (type, value) of each: ("array", None) or ("i32", 64). Scalars equal to 1 are compiled in, and absent.
      operands, results: types of the arrays, such as "tensor<2x16xbf16>".
    """

    target: str
    name: str
    num_warps: int
    shared_bytes: int
    compute_capability: int
    grid: tuple[int, int, int]
    scratch_bytes: int
    parameters: tuple[tuple[str, Any], ...]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    ptx: str = dataclasses.field(repr=False)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> KernelCall:
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        fields["parameters"] = tuple(map(tuple, fields["parameters"]))
        return cls(**fields)

    @property
    def entry_types(self) -> list[str]:
        """Types of the PTX entry's parameters: "u64" (pointers too), "u32", "f32"."""
        entry = self.ptx[self.ptx.index(".entry") :]
        return re.findall(r"\.param \.(\w+)", entry[: entry.index("{")])

    def mismatch(self) -> str | None:
        """What is wrong between the call's parameters, its arrays and the compiled kernel; None if nothing is.

        Behind a kernel's own parameters Triton adds two pointers: global scratch and the profiler's.
        """
        arrays = sum(kind == "array" for kind, _ in self.parameters)
        if arrays != len(self.operands) + len(self.results):
            return f"{arrays} pointers for {len(self.operands)} operands and {len(self.results)} results"
        wanted = {"array": "u64", "i32": "u32", "u32": "u32", "i64": "u64", "u64": "u64", "f32": "f32", "f64": "f64"}
        passed = [wanted[kind] for kind, _ in self.parameters]
        if self.entry_types != [*passed, "u64", "u64"]:
            return f"the call passes {passed}, the kernel takes {self.entry_types}"
        if self.scratch_bytes == 0 and "tensormap" in self.ptx:
            return "the kernel makes descriptors, and the call brings no scratch memory for them"
        return None


def lower(function: Callable[..., Any], *args: Any, compute_capability: int = 90) -> list[KernelCall]:
    """The kernel calls of `jax.jit(function)`, lowered for CUDA, in the order of the program's text.

    Args:
      args: arrays or `jax.ShapeDtypeStruct`s.

    A call inside a loop or a function counts once for each place in the text.
    """
    with bind_jax.lowering_for(compute_capability):
        lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
        module = lowered.compiler_ir("stablehlo")
        assert module is not None
        return [_decode(operation) for operation in _custom_calls(module.operation)]


def _custom_calls(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in (view.operation for view in block):
                if inner.name == "stablehlo.custom_call" and "triton" in _text(inner.attributes["call_target_name"]):
                    yield inner
                yield from _custom_calls(inner)


def _text(attribute: Any) -> str:
    return attribute.value


def _decode(operation: Any) -> KernelCall:
    """From the custom call's payload, a compressed `jax_triton.TritonAnyKernelCall` (jaxlib/gpu/triton.proto)."""
    attributes = operation.attributes
    if "mhlo.backend_config" in attributes:  # typed FFI: jax-triton 0.4
        payload = attributes["mhlo.backend_config"]["opaque"]
    else:
        payload = attributes["backend_config"]
    call = _one(_fields(zlib.decompress(payload.value_bytes)), 1)
    call = _fields(call)
    kernel = _fields(_one(call, 1))
    return KernelCall(
        target=_text(attributes["call_target_name"]),
        name=_one(kernel, 1).decode(),
        num_warps=_one(kernel, 2, 0),
        shared_bytes=_one(kernel, 3, 0),
        compute_capability=_one(kernel, 6, 0),
        grid=(_one(call, 2, 1), _one(call, 3, 1), _one(call, 4, 1)),
        scratch_bytes=_one(kernel, 12, 0),
        parameters=tuple(_parameter(raw) for number, raw in call if number == 5),
        operands=tuple(str(x.type) for x in operation.operands),
        results=tuple(str(x.type) for x in operation.results),
        ptx=_one(kernel, 4).decode(),
    )


def _parameter(raw: bytes) -> tuple[str, Any]:
    ((number, value),) = _fields(raw)
    kind = {1: "array", 2: "bool", 3: "i32", 4: "u32", 5: "i64", 6: "u64", 7: "f32", 8: "f64"}[number]
    if kind == "array":
        return kind, None
    if kind in ("f32", "f64"):
        return kind, struct.unpack("<f" if kind == "f32" else "<d", value)[0]
    return kind, value - (1 << 64) if kind in ("i32", "i64") and value >> 63 else value


def _fields(message: bytes) -> list[tuple[int, Any]]:
    """(number, value) of a protocol buffer's fields: an int, or bytes."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            value: Any = varint()
        else:
            size = {1: 8, 5: 4}[wire] if wire != 2 else varint()
            value, at = message[at : at + size], at + size
        found.append((number, value))
    return found


def _one(fields: list[tuple[int, Any]], number: int, default: Any = None) -> Any:
    return next((value for found, value in fields if found == number), default)


# -- cases -------------------------------------------------------------------------------------------------------------

#: By name: functions without arguments that lower something.
CASES: dict[str, Callable[[], list[KernelCall]]] = {}


def case(function: Callable[[], list[KernelCall]]) -> Callable[[], list[KernelCall]]:
    """Adds a function to `CASES`."""
    CASES[function.__name__] = function
    return function


_gradients = jax.grad(loss, argnums=(0, 1))


@case
def jit() -> list[KernelCall]:
    return lower(functools.partial(product, Program()), *shapes())


@case
def ampere() -> list[KernelCall]:
    return lower(functools.partial(product, Program()), *shapes(), compute_capability=80)


@case
def traced_before() -> list[KernelCall]:
    """A function whose trace JAX has kept from before is compiled for what is asked for now."""
    function = jax.jit(functools.partial(product, Program()))
    function.trace(*shapes())
    return lower(function, *shapes())


@case
def scale_one() -> list[KernelCall]:
    return lower(functools.partial(product, Program(scale=1.0)), *shapes())


@case
def tiny_scale() -> list[KernelCall]:
    return lower(functools.partial(product, Program(scale=1e-42)), *shapes())


@case
def descriptors() -> list[KernelCall]:
    return lower(functools.partial(product, Program(descriptors=True)), *shapes())


@case
def grad() -> list[KernelCall]:
    return lower(_gradients, *shapes())


@case
def vmap() -> list[KernelCall]:
    return lower(jax.vmap(functools.partial(product, Program()), (0, 0, None)), *shapes(3))


@case
def vmap_of_grad() -> list[KernelCall]:
    return lower(jax.vmap(_gradients, (0, 0, None)), *shapes(3))


@case
def vmap_of_tables() -> list[KernelCall]:
    x, w, _ = shapes()
    tables = (jax.ShapeDtypeStruct((5, 40), jnp.int32),) * 2
    return lower(jax.vmap(functools.partial(product, Program()), (None, None, 0)), x, w, tables)


@case
def scan() -> list[KernelCall]:
    def layers(x: Any, w: Any, tables: Any) -> Any:
        return jax.lax.scan(lambda x, w: product(Program(), x, w, tables), x, w)

    _, w, _ = shapes(4)
    x, _, tables = shapes()
    return lower(layers, x, w, tables)


@case
def remat() -> list[KernelCall]:
    return lower(jax.grad(jax.checkpoint(loss)), *shapes())


@case
def shard_map() -> list[KernelCall]:
    axes = jax.sharding.PartitionSpec("data")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(axes, axes, jax.sharding.PartitionSpec()), out_specs=(axes, axes)
    )
    def gradients(x: Any, w: Any, tables: Any) -> Any:
        return _gradients(x, w, tables)

    return lower(gradients, *shapes())


@case
def export() -> list[KernelCall]:
    import jax.export

    with bind_jax.lowering_for(90):
        made = jax.export.export(
            jax.jit(functools.partial(product, Program())),
            platforms=("cuda",),
            disabled_checks=bind_jax.export_checks(),
        )(*shapes())
    assert made.serialize()
    return lower(made.call, *shapes())


# -- the program -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """What `main` printed.

    Attributes:
      about: of the environment: "supports_descriptors", "export_checks", "cache_dir".
      calls: by case.
      errors: tracebacks by case; "" is the process's own end.
      seconds: by case.
    """

    about: dict[str, Any]
    calls: dict[str, list[KernelCall]]
    errors: dict[str, str]
    seconds: dict[str, float]

    def __getitem__(self, name: str) -> list[KernelCall]:
        assert name in self.calls, self.errors.get(name) or self.errors.get("") or f"no such case: {name}"
        return self.calls[name]


def report(python: str, module: str = "tests.codegen.triton.lowering", *names: str, **environment: str) -> Report:
    """Runs the module's cases in another process of another interpreter, which is not interpreted."""
    root = Path(__file__).parents[3]
    ours = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ours |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root / "src"), **environment}
    done = subprocess.run(
        [python, "-W", "error", "-m", module, *names],
        check=False, cwd=root, env=ours, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    about, *lines = [json.loads(line) for line in done.stdout.splitlines()] or [{}]
    errors = {line["case"]: line["error"] for line in lines if "error" in line}
    if done.returncode:
        errors[""] = f"exit status {done.returncode}\n{done.stderr}"
    calls = {x["case"]: [KernelCall.from_json(call) for call in x["calls"]] for x in lines if "calls" in x}
    return Report(about, calls, errors, {line["case"]: line["seconds"] for line in lines})


def main(cases: Mapping[str, Callable[[], list[KernelCall]]], names: list[str]) -> None:
    """Prints what `report` reads."""
    about = {
        "supports_descriptors": bind_jax.supports_descriptors(),
        "export_checks": [check.is_custom_call() for check in bind_jax.export_checks()],
        "cache_dir": os.environ.get("TRITON_CACHE_DIR"),
    }
    print(json.dumps(about), flush=True)
    for name in names or cases:
        line: dict[str, Any] = {"case": name}
        start = time.perf_counter()
        try:
            line["calls"] = [dataclasses.asdict(call) for call in cases[name]()]
        except Exception:
            line["error"] = traceback.format_exc()
        print(json.dumps({**line, "seconds": round(time.perf_counter() - start, 3)}), flush=True)


if __name__ == "__main__":
    main(CASES, sys.argv[1:])
