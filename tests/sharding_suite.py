"""What every implementation of attention does with arrays on several devices; see `attention_suite`."""

from __future__ import annotations

import pytest

from tests.attention_suite import in_subprocess


class ShardingSuite:
    """Subclass it, and name the implementation."""

    implementation: str

    #: Whether XLA can be told how to split it.
    splits: bool = True

    def test_shard_map(self) -> None:
        """Over the batch and over heads, on two devices: no communication, the same numbers; forward and backward."""
        printed = in_subprocess(
            f"""
            import jax, jax.numpy as jnp, numpy as np, splat
            from jax.sharding import PartitionSpec as P

            assert jax.device_count() == 2
            rng = np.random.default_rng(0)
            q, k, v = (jnp.asarray(rng.standard_normal((2, 24, n, 8)), jnp.float32) for n in (4, 2, 2))
            for pattern in (splat.causal() & splat.window(5) | splat.sink(1), splat.window(2) - splat.window(2)):
                attend = lambda q, k, v: splat.attention(q, k, v, pattern, implementation={self.implementation!r})
                loss = lambda q, k, v: (attend(q, k, v) ** 2).sum()
                for spec in (P("x"), P(None, None, "x")):
                    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
                    with jax.set_mesh(mesh):
                        sharded = jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec)
                        args = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in (q, k, v)]
                        out = jax.jit(sharded)(*args)
                        grads = jax.jit(jax.grad(lambda *x: (sharded(*x) ** 2).sum(), (0, 1, 2)))(*args)
                        text = jax.jit(sharded).lower(*args).compile().as_text()
                    assert not any(name in text for name in ("all-reduce", "all-gather", "all-to-all"))
                    np.testing.assert_allclose(out, attend(q, k, v), atol=1e-6)
                    for a, b in zip(grads, jax.grad(loss, (0, 1, 2))(q, k, v)):
                        np.testing.assert_allclose(a, b, atol=1e-5)
                    print(spec)
            """,
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
        )
        assert len(printed.splitlines()) == 4

    @pytest.mark.parametrize("kind", ["Auto", "Explicit"])
    def test_sharded(self, kind: str) -> None:
        """Under jit, over batch and heads: every device its part, nothing gathered; mesh axes of both types.

        Where XLA is not told how (type Auto), the numbers of one case are all there is to see.
        """
        ours = self.splits or kind == "Explicit"
        printed = in_subprocess(
            f"""
            import re, jax, jax.numpy as jnp, numpy as np, splat
            from jax.sharding import NamedSharding, PartitionSpec as P

            kind = jax.sharding.AxisType.{kind}
            mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
            rng = np.random.default_rng(0)
            local = splat.causal() & splat.window(5)

            def attend(q, k, v, pattern=local, **options):
                out, lse = splat.attention(
                    q, k, v, pattern, return_lse=True, implementation={self.implementation!r}, **options
                )
                return (out * jnp.where(jnp.isfinite(lse), lse, 0)[..., None]).sum()

            def run_time(q, k, v, n, ids, offset, sinks, more):
                pattern = local & splat.segments(ids)
                one = attend(q, k, v, pattern, sinks=sinks, query_offset=offset, kv_lengths=n)
                return one + attend(q, k, v, sinks=more)

            def positions(q, k, v, n):
                return attend(q, k, v, query_offset=n)

            def by_head(q, k, v):
                return attend(q, k, v, splat.per_head([local, splat.causal()] * 2))

            def mapped(*arrays):
                return jax.vmap(attend)(*arrays).sum()

            whole, batch, both, heads = P(), P("data"), P(("data", "model")), P("data", None, "model")
            ids = jnp.repeat(jnp.arange(3, dtype=jnp.int32), 8)
            sinks = jnp.linspace(-2, 3, 4)
            further = (
                (jnp.asarray([24, 7]), batch), (ids, whole), (jnp.int32(0), whole), (sinks, P("model")), (sinks, whole)
            )
            cases = [  # what, leading axes, key heads, shardings of query, of key and value; further arguments
                (run_time, (2,), 2, heads, heads, further),
                (attend, (2,), 1, heads, batch, ()),  # every device needs the one key head
                (by_head, (4,), 2, both, both, ()),
                (mapped, (2, 1), 2, batch, batch, ()),
            ]
            if {kind!r} == "Explicit":
                cases.append((positions, (2,), 2, heads, heads, ((jnp.asarray([20, 3]), batch),)))
            for loss, leading, num_kv_heads, spec, kv_spec, further in cases if {ours} else cases[:1]:
                arrays = [
                    jnp.asarray(rng.standard_normal((*leading, 24, n, 8)), jnp.float32)
                    for n in (4, num_kv_heads, num_kv_heads)
                ]
                more = [x for x, _ in further]
                wanted = jax.grad(loss, (0, 1, 2))(*arrays, *more)
                specs = [spec, kv_spec, kv_spec, *(one for _, one in further)]
                given = [jax.device_put(x, NamedSharding(mesh, one)) for x, one in zip([*arrays, *more], specs)]
                with jax.set_mesh(mesh):
                    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*given).compile()
                    found = compiled(*given)
                for a, b, x in zip(found, wanted, given):
                    np.testing.assert_allclose(a, b, atol=1e-5)
                    assert not {ours} or a.sharding.is_equivalent_to(x.sharding, x.ndim), (loss, a.sharding)
                moved = re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text())
                print("moved:", *set(moved))
            """,
            XLA_FLAGS="--xla_force_host_platform_device_count=4",
        )
        moved = [line.split()[1:] for line in printed.splitlines()]
        assert moved == [[]] * (5 if kind == "Explicit" else 4) if ours else len(moved) == 1

    def test_sharded_as_cannot_be_split(self) -> None:
        """Positions, and arrays that disagree: a sentence that says what to do. Where XLA decides, it gathers."""
        printed = in_subprocess(
            f"""
            import jax, jax.numpy as jnp, numpy as np, splat
            from jax.sharding import NamedSharding, PartitionSpec as P

            x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 2, 8)), jnp.float32)
            attend = lambda q, k: splat.attention(q, k, k, splat.causal(), implementation={self.implementation!r})
            for kind in (jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto):
                mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
                whole, first, heads, elements = P(), P("x"), P(None, None, "x"), P(None, None, None, "x")
                for specs in ((P(None, "x"), P(None, "x")), (first, heads), (elements, whole)):
                    with jax.set_mesh(mesh):
                        q, k = (jax.device_put(x, NamedSharding(mesh, spec)) for spec in specs)
                        try:
                            np.testing.assert_allclose(jax.jit(attend)(q, k), attend(x, x), atol=1e-6)
                            print("gathered")
                        except splat.ArgumentError as error:
                            print(error)
            """,
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
        )
        lines = printed.splitlines()
        assert lines[3:] == ["gathered"] * 3
        assert lines[0].startswith("query is sharded as P(None, 'x', None, None), but positions cannot be split")
        assert "jax.sharding.reshard(query, P(None, None, None, None))" in lines[0]
        assert lines[1].startswith("key is sharded as P(None, None, 'x', None), but heads are split into equal parts")
        assert "jax.sharding.reshard(key, P('x', None, None, None))" in lines[1]
        assert "but elements of heads cannot be split" in lines[2]

    def test_no_array_is_sharded(self) -> None:
        """A mesh that is set, of either type, changes nothing for arrays on one device; nor do sharded segment ids."""
        printed = in_subprocess(
            f"""
            import jax, jax.numpy as jnp, numpy as np, splat
            from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

            x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 8, 2, 8)), jnp.float32)
            ids = jnp.asarray([0, 0, 0, 1, 1, 1, 1, 2], jnp.int32)

            def attend(x, ids=None):
                pattern = splat.causal() if ids is None else splat.causal() & splat.segments(ids)
                return splat.attention(x, x, x, pattern, implementation={self.implementation!r})

            once, documents = jax.vmap(attend)(x), attend(x[0], ids)
            for kind in (AxisType.Explicit, AxisType.Auto):
                mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
                with jax.set_mesh(mesh):
                    np.testing.assert_allclose(jax.vmap(attend)(x), once, atol=1e-6)
                    np.testing.assert_allclose(jax.jit(jax.vmap(attend))(x), once, atol=1e-6)
                    one, other = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x[0], P()), (ids, P("x"))))
                    np.testing.assert_allclose(jax.jit(attend)(one, other), documents, atol=1e-6)
                print("same")
            """,
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
        )
        assert printed.split() == ["same", "same"]

    def test_sharded_arrays_outside_jit(self) -> None:
        """What a first call has compiled, later ones use, with other documents too: milliseconds, not seconds."""
        printed = in_subprocess(
            f"""
            import time, jax, jax.numpy as jnp, numpy as np, splat
            from jax.sharding import NamedSharding, PartitionSpec as P

            def attend(x, ids):
                pattern = splat.window(3) & splat.segments(ids)
                return splat.attention(x, x, x, pattern, implementation={self.implementation!r})

            mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
            x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 2, 8)), jnp.float32)
            with jax.set_mesh(mesh):
                given = jax.device_put(x, NamedSharding(mesh, P("x")))
                for n in (2, 3, 5):
                    ids = jnp.arange(8, dtype=jnp.int32) // n
                    begin = time.perf_counter()
                    out = jax.block_until_ready(attend(given, ids))
                    print(time.perf_counter() - begin)
            np.testing.assert_allclose(out, attend(x, ids), atol=1e-6)
            assert out.sharding.is_equivalent_to(given.sharding, 4)
            """,
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
        )
        first, *later = map(float, printed.split())
        assert min(later) < first / 3

    def test_positions_over_devices(self) -> None:
        """A device's queries attend to everyone's keys from where they are; gradients come back to their parts."""
        printed = in_subprocess(
            f"""
            import jax, jax.numpy as jnp, numpy as np, splat
            from jax.sharding import NamedSharding, PartitionSpec as P

            pattern = splat.causal() & splat.window(9) | splat.sink(2)
            rng = np.random.default_rng(0)
            arrays = [jnp.asarray(rng.standard_normal((1, 32, 2, 8)), jnp.float32) for _ in range(3)]

            def attend(q, k, v, offset=0):
                return splat.attention(q, k, v, pattern, query_offset=offset, implementation={self.implementation!r})

            def part(q, k, v):
                k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
                return attend(q, k, v, jax.lax.axis_index("context") * q.shape[1])

            spec, mesh = P(None, "context"), jax.make_mesh((2,), ("context",))
            gradients = lambda run: jax.grad(lambda *arrays: (run(*arrays) ** 2).sum(), (0, 1, 2))
            with jax.set_mesh(mesh):
                given = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
                found = jax.jit(gradients(jax.shard_map(part, in_specs=(spec,) * 3, out_specs=spec)))(*given)
            for a, b, x in zip(found, gradients(attend)(*arrays), given):
                np.testing.assert_allclose(a, b, atol=1e-5)
                assert a.sharding.is_equivalent_to(x.sharding, x.ndim)
            print("same")
            """,
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
        )
        assert printed == "same\n"
