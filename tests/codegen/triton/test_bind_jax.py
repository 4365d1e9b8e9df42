"""Launches from JAX under Triton's interpreter, on the CPU: numbers, transformations, and faults made loud."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="the `jax-cuda` extra is not installed")

import triton
import triton.language as tl

from splat.codegen.triton import bind_jax, interpret
from splat.codegen.triton.launch import Kernel, Launch, Output
from tests.codegen.triton.product import Program, loss, product, product_launch, reference

pytestmark = pytest.mark.skipif(not interpret.is_interpreted(), reason="TRITON_INTERPRET=1 is not set")

BATCH, LENGTH, WIDTH = 2, 21, 16
DTYPES = ("float32", "bfloat16", "float16")


def arrays(rng: np.random.Generator, *leading: int, dtype: str = "float32") -> tuple[Any, Any, Any]:
    """x, w and tables of `product`; `leading` axes before those of x and w."""
    x = rng.standard_normal((*leading, BATCH, LENGTH, WIDTH), np.float32)
    w = rng.standard_normal((*leading, BATCH, WIDTH, WIDTH), np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), permutation(rng)


def permutation(rng: np.random.Generator) -> Any:
    rows = rng.permutation(LENGTH).astype(np.int32)
    return jnp.asarray(rows), jnp.asarray(np.argsort(rows).astype(np.int32))


def check(found: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (1 + np.abs(b).max()))


ours = functools.partial(product, Program())
theirs = functools.partial(reference, Program())
our_loss = functools.partial(loss, function=product)
their_loss = functools.partial(loss, function=reference)
our_grad = jax.grad(our_loss, (0, 1))
their_grad = jax.grad(their_loss, (0, 1))


def in_subprocess(program: str, **environment: str) -> None:
    """Runs a Python program from the repository's root; fails if it fails."""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=False, cwd=root, env=os.environ | {"PYTHONPATH": str(root / "src")} | environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("jit", [False, True])
def test_numbers(rng: np.random.Generator, dtype: str, jit: bool) -> None:
    x, w, tables = arrays(rng, dtype=dtype)
    found = (jax.jit(ours) if jit else ours)(x, w, tables)
    check(found, theirs(x, w, tables), 2e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_descriptors(rng: np.random.Generator, dtype: str) -> None:
    x, w, tables = arrays(rng, dtype=dtype)
    assert bind_jax.supports_descriptors()
    found = product(Program(descriptors=True), x, w, tables)
    check(found, theirs(x, w, tables), 2e-5 if dtype == "float32" else 1e-2)


def test_large_arrays(rng: np.random.Generator) -> None:
    """XLA copies large arrays in threads of its own, which a callback must not wait for in vain."""
    x = jnp.asarray(rng.standard_normal((1, 20_000, 64), np.float32))
    copy_launch = dataclasses.replace(_launch(copy, x), scalars=(x.size,))
    run = jax.jit(lambda x: bind_jax.launch(dataclasses.replace(copy_launch, arrays=(x,))))
    np.testing.assert_array_equal(run(x)[0], x)


# -- transformations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True])
def test_grad(rng: np.random.Generator, jit: bool) -> None:
    args = arrays(rng)
    check((jax.jit(our_grad) if jit else our_grad)(*args), their_grad(*args), 1e-4)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("axes", [(0, 0, None), (0, None, None), (None, 0, None), (2, 1, None)])
def test_vmap(rng: np.random.Generator, axes: tuple, jit: bool) -> None:
    x, w, tables = arrays(rng, 3)
    x = x[0] if axes[0] is None else jnp.moveaxis(x, 0, axes[0])
    w = w[0] if axes[1] is None else jnp.moveaxis(w, 0, axes[1])
    mapped = jax.vmap(ours, axes)
    check((jax.jit(mapped) if jit else mapped)(x, w, tables), jax.vmap(theirs, axes)(x, w, tables))


@pytest.mark.parametrize("axes", [(None, None, 0), (0, None, 0), (0, 0, 0), (None, None, (0, None))])
def test_vmap_over_tables(rng: np.random.Generator, axes: tuple) -> None:
    x, w, _ = arrays(rng, 3)
    x, w = (array[0] if axis is None else array for array, axis in zip((x, w), axes, strict=False))
    tables = jax.tree.map(lambda *parts: jnp.stack(parts), *(permutation(rng) for _ in range(3)))
    if axes[2] != 0:
        tables = (tables[0], tables[1][0])
    check(jax.vmap(ours, axes)(x, w, tables), jax.vmap(theirs, axes)(x, w, tables))


def test_nested_vmap(rng: np.random.Generator) -> None:
    x, w, tables = arrays(rng, 2, 3)

    def both(function: Any) -> Any:
        return jax.vmap(jax.vmap(function, (0, 0, None)), (1, None, None), 1)

    check(jax.jit(both(ours))(jnp.swapaxes(x, 0, 1), w[0], tables), both(theirs)(jnp.swapaxes(x, 0, 1), w[0], tables))


def test_vmap_over_tables_and_then_over_arrays(rng: np.random.Generator) -> None:
    x, w, _ = arrays(rng, 2)
    tables = jax.tree.map(lambda *parts: jnp.stack(parts), *(permutation(rng) for _ in range(3)))

    def both(function: Any) -> Any:
        return jax.vmap(jax.vmap(function, (None, None, 0)), (0, 0, None))

    check(both(ours)(x, w, tables), both(theirs)(x, w, tables))


@pytest.mark.parametrize("jit", [False, True])
def test_vmap_of_grad(rng: np.random.Generator, jit: bool) -> None:
    args = arrays(rng, 3)
    mapped = jax.vmap(our_grad, (0, 0, None))
    check((jax.jit(mapped) if jit else mapped)(*args), jax.vmap(their_grad, (0, 0, None))(*args), 1e-4)


def test_grad_of_vmap(rng: np.random.Generator) -> None:
    x, w, tables = arrays(rng, 3)

    def total(loss: Any) -> Any:
        return jax.grad(lambda x, w: jax.vmap(loss, (0, None, None))(x, w, tables).sum(), (0, 1))

    check(jax.jit(total(our_loss))(x, w[0]), total(their_loss)(x, w[0]), 1e-4)


def test_grad_of_vmap_over_tables(rng: np.random.Generator) -> None:
    x, w, _ = arrays(rng, 3)
    tables = jax.tree.map(lambda *parts: jnp.stack(parts), *(permutation(rng) for _ in range(3)))

    def total(loss: Any) -> Any:
        return jax.grad(lambda x, w: jax.vmap(loss, (0, None, 0))(x, w, tables).sum(), (0, 1))

    check(jax.jit(total(our_loss))(x, w[0]), total(their_loss)(x, w[0]), 1e-4)


def test_grad_of_scan_with_remat(rng: np.random.Generator) -> None:
    x, _, tables = arrays(rng)
    _, w, _ = arrays(rng, 3)

    def total(function: Any) -> Any:
        @jax.checkpoint
        def layer(x: Any, w: Any) -> Any:
            y, sums = function(x, w / 4, tables)
            return y, sums.sum()

        return jax.grad(lambda x, w: jax.lax.scan(layer, x, w)[0].sum(), (0, 1))

    check(jax.jit(total(ours))(x, w), total(theirs)(x, w), 1e-4)


def test_shard_map(rng: np.random.Generator) -> None:
    """Results vary over the mesh as the arrays do, which shard_map checks."""
    args = arrays(rng)
    over, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for ours_, theirs_ in ((ours, theirs), (our_grad, their_grad), (jax.checkpoint(ours), theirs)):
        sharded = jax.shard_map(ours_, mesh=mesh, in_specs=(over, over, whole), out_specs=over)
        check(jax.jit(sharded)(*args), theirs_(*args), 1e-4)


def test_two_devices_and_large_arrays() -> None:
    """Callbacks of both devices at once, with operands that JAX would copy in the threads that the callbacks occupy."""
    in_subprocess(
        """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P
        from tests.codegen.triton.product import Program, product, reference

        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1024, 64)), jnp.float32)
        index = jnp.arange(1024, dtype=jnp.int32)
        args = (x, x[:, :64], (index, index))
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        run = lambda *args: product(Program(), *args)
        sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P("data"), P()), out_specs=P("data")))
        for found, wanted in zip(sharded(*args), reference(Program(), *args), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-4)
        """,
        TRITON_INTERPRET="1",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )


def test_absent_arrays_and_every_batch(rng: np.random.Generator) -> None:
    """None is an empty pytree, batched and shared alike; the static argument is handed on."""

    @bind_jax.vmappable("BTH BS -> BTH")
    def scaled(factor: int, batched: Any, shared: Any) -> Any:
        seen.add(batched[0].shape)
        assert batched[1] is None
        assert shared is None
        return (factor * batched[0],)

    seen: set[tuple[int, ...]] = set()
    x = jnp.asarray(rng.standard_normal((4, 3, 0, 2)))
    assert jax.vmap(lambda x: scaled(3)((x, None), None)[0])(x).shape == (4, 3, 0, 2)
    assert seen == {(3, 0, 2), (12, 0, 2)}
    assert jax.vmap(lambda x: scaled(3)((x, None), None)[0])(x[:, :0]).shape == (4, 0, 0, 2)


def test_import_is_light() -> None:
    """No device is touched, and neither triton nor jax_triton is loaded."""
    in_subprocess(
        """
        import sys
        from splat.codegen.triton import bind_jax
        from jax._src import xla_bridge

        bind_jax.missing(), bind_jax.supports_descriptors()
        assert not {"triton", "jax_triton"} & set(sys.modules)
        assert not xla_bridge.backends_are_initialized()
        """
    )


# -- launches ----------------------------------------------------------------------------------------------------------


@triton.jit  # pyright: ignore[reportAttributeAccessIssue]
def copy(X, count, Y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, mask=at < count), mask=at < count)


@triton.jit  # pyright: ignore[reportAttributeAccessIssue]
def copy_past_the_end(X, count, Y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at), mask=at <= count)


@triton.jit  # pyright: ignore[reportAttributeAccessIssue]
def overwrite(X, count, Y, BLOCK: tl.constexpr):
    tl.store(X + tl.arange(0, BLOCK), tl.load(Y + tl.arange(0, BLOCK)))


@triton.jit  # pyright: ignore[reportAttributeAccessIssue]
def far_away(X, count, Y, BLOCK: tl.constexpr):
    at = tl.program_id(0) + tl.arange(0, BLOCK) * count * count
    tl.store(Y + at, tl.load(X + at, mask=at < count), mask=at < count)


@triton.jit  # pyright: ignore[reportAttributeAccessIssue]
def arithmetic(X, scale, Y, BLOCK: tl.constexpr):
    x = tl.load(X + tl.arange(0, BLOCK))
    x = tl.where(x > -x, x + x, x * x)
    tl.store(Y + tl.arange(0, BLOCK), (x.to(tl.float32) * scale).to(tl.bfloat16))


def _launch(function: Any, x: Any, dtype: str = "float32", **changes: Any) -> Launch:
    block = 4096
    base = Launch(
        Kernel(getattr(function, "__name__", "copy"), "", function), -(-x.size // block), (x,), (x.size,),
        (Output(x.shape, dtype),), dict(BLOCK=block), 4, 1,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int32", "int64", "int8", "bool"])
def test_dtypes_and_poison(dtype: str) -> None:
    """What is not written is poison: NaN, the most negative int, or True."""
    x = np.asarray(np.arange(10) % 2, jnp.dtype(dtype))
    (found,) = interpret.launch(_launch(copy, x, dtype, outputs=(Output((3, 4), dtype),)))
    assert found.shape == (3, 4)
    assert found.dtype == x.dtype
    wanted = np.append(x, np.full(2, interpret.poison(dtype), x.dtype))
    exact = np.float64 if "float" in dtype else x.dtype
    np.testing.assert_array_equal(found.ravel().astype(exact), wanted.astype(exact))


def test_bfloat16_rounds_to_nearest_even(rng: np.random.Generator) -> None:
    x = np.concatenate([rng.standard_normal(250), [np.nan, np.inf, -np.inf, 3.4e38, 1e-40, 0]]).astype(jnp.bfloat16)
    scale = 0.7310585975646973
    launch = _launch(arithmetic, x, "bfloat16", scalars=(scale,), constants=dict(BLOCK=256))
    (found,) = interpret.launch(launch)
    with np.errstate(all="ignore"):
        exact = np.where(x > -x, x + x, x * x).astype(np.float32) * np.float32(scale)
    np.testing.assert_array_equal(found.astype(np.float32), exact.astype(jnp.bfloat16).astype(np.float32))


def test_no_programs(rng: np.random.Generator) -> None:
    """Nothing is launched, inside or outside jit; on a GPU an empty grid is an error."""
    x = jnp.asarray(rng.standard_normal(5), jnp.float32)
    for run in (lambda x: bind_jax.launch(_launch(copy, x, programs=0)),):
        assert np.isnan(run(x)[0]).all()
        assert "callback" not in jax.jit(run).lower(x).as_text()


def test_writes_outside_are_found() -> None:
    x = np.ones(10, np.float32)
    with pytest.raises(RuntimeError, match="wrote past the end of output 0 of copy_past_the_end"):
        interpret.launch(_launch(copy_past_the_end, x))
    with pytest.raises(RuntimeError, match="wrote to input 0 of overwrite"):
        interpret.launch(_launch(overwrite, x, constants=dict(BLOCK=8)))


def test_overflow_is_found() -> None:
    with pytest.raises(Exception, match=r"far_away, program 0 of 1: .*int32 overflow in mul"):
        interpret.launch(_launch(far_away, np.ones(70_000, np.float32), programs=1, constants=dict(BLOCK=4)))


def test_inputs_are_left_alone(rng: np.random.Generator) -> None:
    """Also those that are not contiguous."""
    x = rng.standard_normal((20, 3)).astype(np.float32).T
    x.flags.writeable = False
    (found,) = interpret.launch(_launch(copy, x))
    np.testing.assert_array_equal(found, x)


def test_failures_reach_the_caller(rng: np.random.Generator) -> None:
    run = jax.jit(lambda x: bind_jax.launch(_launch(copy_past_the_end, x)))
    with pytest.raises(Exception, match="wrote past the end of output 0"):
        jax.block_until_ready(run(jnp.ones(10)))


def test_launches_are_neither_batched_nor_differentiated_by_themselves(rng: np.random.Generator) -> None:
    x, w, (rows, _) = arrays(rng, 3)
    with pytest.raises(NotImplementedError):
        jax.vmap(lambda x, w: bind_jax.launch(product_launch(Program(), x, w, rows)))(x, w)
    with pytest.raises(ValueError, match="do not support JVP"):
        jax.grad(lambda x: bind_jax.launch(product_launch(Program(), x, w[0], rows))[1].sum())(x[0])


def test_names_that_triton_call_keeps() -> None:
    x = jnp.ones(4)
    jax_triton = pytest.importorskip("jax_triton")
    launch = _launch(copy, x, constants=dict(BLOCK=4, grid=1, name=2))
    with pytest.raises(ValueError, match=r"keeps the names grid, name to itself"):
        bind_jax._check_constants(launch, jax_triton.triton_call)


def test_jax_triton_gets_its_compiler_for_nvidia_back() -> None:
    """As 0.4 leaves it beside Triton 3.6; where it has the compiler, or knows no stubs (0.3.1), nothing changes."""
    compiler, stubs = types.ModuleType("compiler"), types.SimpleNamespace(cb=types.SimpleNamespace())
    whole, older = types.SimpleNamespace(cb=compiler), types.SimpleNamespace()
    for library in (stubs, whole, older):
        bind_jax._restore_nvidia(types.SimpleNamespace(triton_lib=library))
    assert stubs.cb.CUDABackend
    assert whole.cb is compiler
    assert not hasattr(older, "cb")


def test_nothing_is_missing_here() -> None:
    assert bind_jax.missing() is None


def test_missing_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bind_jax.importlib.util, "find_spec", lambda name: None)
    assert bind_jax.missing() == "triton is not installed: `pip install splat-attention[jax-cuda]`."
    monkeypatch.setattr(interpret, "is_interpreted", lambda: False)
    assert bind_jax.missing() == "triton and jax-triton are not installed: `pip install splat-attention[jax-cuda]`."


def test_supports_descriptors_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    versions: dict[str, tuple[int, ...]] = {}
    monkeypatch.setattr(interpret, "is_interpreted", lambda: False)
    monkeypatch.setattr(
        bind_jax, "_version", lambda *names: next((versions[name] for name in names if name in versions), ())
    )
    assert not bind_jax.supports_descriptors()
    versions |= {"jax-triton": (0, 4, 1), "jaxlib": (0, 11, 2), "jax-cuda12-plugin": (0, 11, 1)}
    assert bind_jax.supports_descriptors()
    for package, old in (("jax-triton", (0, 3, 1)), ("jaxlib", (0, 11, 0)), ("jax-cuda12-plugin", (0, 10, 2))):
        with monkeypatch.context() as changed:
            changed.setitem(versions, package, old)
            assert not bind_jax.supports_descriptors()
