"""How functions are split over devices; what attention and operations on values do with it, their own suites test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from splat.codegen.partitioning import Axes, Split, partitioned
from tests.attention_suite import in_subprocess

ATTENTION = Axes.parse("BTNH BSKH BSKH -> BTNH BTN")


def split(
    query: tuple[Any, ...], key: tuple[Any, ...], sizes: dict[str, int], heads: tuple[int, int] = (8, 4)
) -> Split:
    shapes = [jax.ShapeDtypeStruct((4, 24, n, 8), jnp.float32) for n in (heads[0], heads[1], heads[1])]
    return Split.find(ATTENTION, shapes, [PartitionSpec(*one) for one in (query, key, key)], sizes)


@pytest.mark.parametrize(
    ("query", "key", "heads", "over", "parts", "lent"),
    [
        ((), (), (8, 4), {}, 1, None),
        (("x",), ("x",), (8, 4), {"B": ("x",)}, 1, None),
        (("x", None, "y"), (), (8, 4), {"B": ("x",), "N": ("y",), "K": ("y",)}, 4, None),
        ((), (None, None, "y"), (8, 4), {"N": ("y",), "K": ("y",)}, 4, None),
        ((("x", "y"),), (), (8, 4), {"B": ("x",)}, 1, None),  # four batch entries are not eight
        ((None, None, ("x", "y")), (), (8, 2), {"N": ("x", "y")}, 8, 2),
        ((None, None, "y"), (), (8, 1), {"N": ("y",)}, 4, 1),
        ((None, None, "y"), (), (8, 8), {"N": ("y",), "K": ("y",)}, 4, None),
        ((None, None, "x"), (), (6, 3), {}, 1, None),  # the middle key head would be two devices'
        ((None, "x", None, "y"), (), (8, 4), {}, 1, None),
        (("x",), (None, None, "x"), (8, 4), {"B": ("x",)}, 1, None),  # a mesh axis is used once
        (("x",), (None, None, "y"), (8, 4), {"B": ("x",), "N": ("y",), "K": ("y",)}, 4, None),
    ],
)  # fmt: skip
def test_split(query: Any, key: Any, heads: Any, over: Any, parts: int, lent: int | None) -> None:
    assert split(query, key, {"x": 2, "y": 4}, heads) == Split(over, parts, lent)


def test_specs() -> None:
    found = split(("x", None, "y"), (), {"x": 2, "y": 4})
    assert found.spec("BTNH") == PartitionSpec("x", None, "y", None)
    assert found.spec("BSKH") == PartitionSpec("x", None, "y", None)
    assert found.spec("BTN") == PartitionSpec("x", None, "y")
    assert found.spec("") == PartitionSpec()


def test_axes() -> None:
    """None is left out; B stands for any number of axes."""
    x, y = jnp.zeros((2, 3, 4, 5)), jnp.zeros((2, 3))
    axes = Axes.parse("BTH B BH -> BT")
    assert axes.of((x[0], None, x[0, 0])) == Axes(("BTH", "BH"), ("BT",))
    assert axes.of((x, y, None)) == Axes(("BATH", "BA"), ("BAT",))
    assert axes.of((x[0, 0], None, None)) == Axes(("TH",), ("T",))
    assert axes.letters(5) == ("BTH", "B", "BH", "", "")


def test_one_device_sees_no_partitioning() -> None:
    """The program is as if there were none, constants included."""

    def double(x: Any, table: Any) -> Any:
        return (x * 2 + table + jnp.asarray([1.0, 2.0]),)

    x, table = jnp.ones((3, 2)), jnp.ones(2)
    run = jax.jit(lambda x, table: partitioned(double, Axes.parse("BH -> BH"), x, table)[0])
    assert run(x, table).tolist() == [[4, 5]] * 3
    assert "CustomSPMDPartitioning" not in run.lower(x, table).as_text()


def test_mixed_meshes_and_parts_that_are_all_alike() -> None:
    """One mesh axis of either type, arrays on every device whole, and kernels inside shard_map over some axes only."""
    printed = in_subprocess(
        """
        import jax, jax.numpy as jnp, numpy as np, splat
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

        q, k, v = (jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 4, 8)), jnp.float32) for _ in range(3))
        attend = lambda q, k, v: splat.attention(q, k, v, splat.causal() & splat.window(5), implementation=None)
        wanted = jax.grad(lambda *x: (attend(*x) ** 2).sum())(q, k, v)

        def check(kinds, spec, function=attend):
            mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds)
            with jax.set_mesh(mesh):
                given = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v)]
                found = jax.jit(jax.grad(lambda *x: (function(*x) ** 2).sum()))(*given)
            np.testing.assert_allclose(found, wanted, atol=1e-5)
            print("same")

        auto, explicit = AxisType.Auto, AxisType.Explicit
        both = P("data", None, "model")
        check((explicit, auto), both)
        check((auto, explicit), both)
        check((explicit, explicit), P())
        check((auto, auto), P())
        data = P("data")
        check((auto, auto), both, jax.shard_map(attend, in_specs=(data,) * 3, out_specs=data, axis_names={"data"}))
        check((auto, auto), both, jax.shard_map(attend, in_specs=(both,) * 3, out_specs=both, check_vma=False))
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
    assert printed.split() == ["same"] * 6


def test_programs_that_jax_keeps(tmp_path: Path) -> None:
    """Found again where addresses are left out of the keys, by whoever computes the same, and by nobody else."""

    def entries(scale: float) -> set[str]:
        printed = in_subprocess(
            f"""
            import jax, jax.numpy as jnp, numpy as np, splat
            from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

            def loss(x):
                return (splat.attention(x, x, x, splat.window(3), scale={scale}) ** 2).sum()

            # Four heads are enough for both threads, a device's one head is not: it takes other kernels.
            x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16, 1, 8)), jnp.float32)
            wanted = jax.grad(loss)(x)
            mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
            found = jax.jit(jax.grad(loss))(jax.device_put(x, NamedSharding(mesh, P("x"))))
            np.testing.assert_allclose(found, wanted, atol=1e-5)
            print("same")
            """,
            XLA_FLAGS="--xla_force_host_platform_device_count=4",
            JAX_COMPILATION_CACHE_DIR=str(tmp_path),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
            JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY="1",
        )
        assert printed == "same\n"
        return {path.name for path in tmp_path.iterdir() if not path.name.endswith("-atime")}

    first = entries(0.3)
    assert entries(0.3) == first
    assert len(entries(0.4)) > len(first)
