"""Functions of arrays that lie on several devices: every device computes its own batch entries and heads.

XLA cannot look into a kernel: if it is not told how to split one, it gathers what is sharded, and every device computes
everything. What happens follows from the axes of the mesh:

    all Auto                 `partitioned`: XLA's partitioner, which knows the shardings, asks how to split
    some Explicit            `explicit`: the arrays' types say how they are sharded, and a shard_map follows them
    all of a shard_map's     arrays are a device's part already
    some of a shard_map's,   the same, and what is sharded over Auto axes XLA gathers: JAX cannot ask us about
      or Explicit              some of the axes of a mesh

`explicit` is met twice. Planning is a part of attention, and of run-time patterns it is arithmetic with arrays, so all
of `splat.attention` is inside; and where `jax.vmap` hides a sharded axis from that, it is the kernels' first one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun, subjaxprs
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from splat.errors import ArgumentError

Array = Any

#: (*operands) -> results.
Function = Callable[..., Sequence[Array]]

#: Letters of axes that every device has whole: positions and elements.
WHOLE = "TSHW"

#: Letters for several axes of batch entries.
BATCH = "BACDEFGIJLMOPQRUVXYZ"


@dataclasses.dataclass(frozen=True)
class Axes:
    """A letter for each axis of a function's operands and results, as in "BTNH BSKH BSKH -> BTNH BTN".

    Those in WHOLE are not split, others may be, wherever they stand alike. B is batch entries. N is query heads and K
    key heads, split together: query head n uses key head n // (N / K). With 8 query heads, 2 key heads and a query
    sharded as P("x", None, "y"), where y is 4 devices, B is split over x and N over y; each device has both key heads,
    and uses one.
    """

    operands: tuple[str, ...]
    results: tuple[str, ...]

    @classmethod
    @lru_cache
    def parse(cls, text: str) -> Axes:
        operands, results = (tuple(side.split()) for side in text.split("->"))
        return cls(operands, results)

    def of(self, arrays: Sequence[Any]) -> Axes:
        """Without the operands that are None, and with as many axes in place of B as the first array has."""
        there = (letters for letters, array in zip(self.operands, arrays, strict=True) if array is not None)
        return Axes(tuple(there), self.results)._with(self.count(arrays[0]))

    def count(self, first: Array) -> int:
        """How many axes the first operand has in place of B."""
        return first.ndim - len(self.operands[0]) + 1

    def _with(self, count: int) -> Axes:
        return Axes(*(tuple(x.replace("B", BATCH[:count]) for x in side) for side in (self.operands, self.results)))

    def letters(self, count: int) -> tuple[str, ...]:
        """Of so many operands: what comes after those that have letters is whole on every device."""
        return (*self.operands, *("" for _ in range(count - len(self.operands))))


@dataclasses.dataclass(frozen=True)
class Split:
    """How a function is split over the axes of a mesh.

    Attributes:
      over: the mesh axes of each letter that is split.
      parts: of the query heads.
      lent: where there are fewer key heads than parts of the query heads, how many: every device has them all and uses
        one of them, as others do. Else None.
    """

    over: Mapping[str, tuple[str, ...]] = dataclasses.field(hash=False)
    parts: int
    lent: int | None

    @classmethod
    def find(cls, axes: Axes, arrays: Sequence[Any], specs: Sequence[Any], sizes: Mapping[str, int]) -> Split:
        """A function is split along an axis as the first operand is that is, as far as parts are equal.

        Args:
          arrays: the operands; only their shapes matter.
          specs: how each is sharded: a PartitionSpec, or None for not at all.
          sizes: of the mesh's axes.
        """
        every = list(zip(axes.operands, arrays, specs, strict=False))
        lengths = {letter: n for letters, x, _ in every for letter, n in zip(letters, x.shape, strict=True)}
        over: dict[str, tuple[str, ...]] = {}
        for letters, _, spec in every:
            for letter, names in zip(letters, spec or (), strict=False):
                letter = "N" if letter == "K" else letter
                taken = {name for others in over.values() for name in others}
                if letter in WHOLE or letter in over or taken.intersection(_names(names)):
                    continue
                if fitting := _fitting(_names(names), letter, lengths, sizes):
                    over[letter] = fitting
        parts = math.prod(sizes[name] for name in over.get("N", ()))
        lent = lengths["K"] if lengths.get("K", parts) % parts else None
        if "N" in over and lent is None:
            over["K"] = over["N"]
        return cls(over, parts, lent)

    def spec(self, letters: str) -> PartitionSpec:
        return PartitionSpec(*(self.over.get(letter) for letter in letters))

    def run(self, function: Function, axes: Axes, *arrays: Array) -> tuple[Array, ...]:
        """What a device does with its parts, where the mesh's axes have names."""
        if self.lent is None:
            return tuple(function(*arrays))
        mine = lax.axis_index(self.over["N"]) * self.lent // self.parts

        def borrow(letters: str, array: Array) -> Array:
            return lax.dynamic_slice_in_dim(array, mine, 1, letters.index("K")) if "K" in letters else array

        def give_back(letters: str, array: Array) -> Array:
            if "K" not in letters:
                return array
            at, dtype = letters.index("K"), jnp.promote_types(array.dtype, jnp.float32)
            zeros = jnp.zeros((*array.shape[:at], self.lent, *array.shape[at + 1 :]), dtype)
            whole = lax.dynamic_update_slice_in_dim(zeros, array.astype(dtype), mine, at)
            return lax.psum(whole, self.over["N"]).astype(array.dtype)

        borrowed = map(borrow, axes.letters(len(arrays)), arrays)
        return tuple(map(give_back, axes.results, function(*borrowed)))


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a PartitionSpec names."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _fitting(
    names: tuple[str, ...], letter: str, lengths: Mapping[str, int], sizes: Mapping[str, int]
) -> tuple[str, ...]:
    """The first of the mesh axes, as many as make equal parts; those of query heads use several whole key heads, or
    one."""
    while names:
        parts = math.prod(sizes[name] for name in names)
        keys = lengths.get("K", parts) if letter == "N" else parts
        if lengths[letter] % parts == 0 and (keys % parts == 0 or parts % keys == 0):
            break
        names = names[:-1]
    return names


# -- mesh axes of type Auto --------------------------------------------------------------------------------------------


def partitioned(function: Function, axes: Axes, *arrays: Array) -> tuple[Array, ...]:
    """`function(*arrays)`, which XLA's partitioner splits as its operands are sharded.

    Args:
      function: uses no traced array but its arguments; its results' shapes follow from theirs. Differentiation and
        `jax.vmap` go outside.
      axes: of the first arrays and of all results. Further arrays are whole on every device.
    """
    if any(kind != AxisType.Auto for kind in jax.sharding.get_abstract_mesh().axis_types):
        return tuple(function(*arrays))
    program = jax.make_jaxpr(lambda *given: tuple(function(*given)))(*arrays)
    if _calls_back(program.jaxpr):  # into Python, as interpreted kernels do: what is called is not kept alive in a part
        return tuple(jaxpr_as_fun(program)(*arrays))
    # custom_partitioning takes no constants, so they become operands. So does the program's text: what XLA is given
    # holds nothing of it but an address, which users may leave out of the key of JAX's persistent compilation cache.
    text = np.frombuffer(hashlib.sha256(str(program).encode()).digest(), np.uint32)
    count, everything = len(arrays), (*arrays, *program.consts, jnp.asarray(text))
    operands = axes.letters(len(everything))

    def whole(*given: Array) -> tuple[Array, ...]:
        return tuple(jaxpr_as_fun(ClosedJaxpr(program.jaxpr, given[count:-1]))(*given[:count]))

    def find(mesh: Mesh, given: Sequence[Any]) -> Split:
        return Split.find(axes, given, [getattr(x.sharding, "spec", None) for x in given], mesh.shape)

    def shardings(mesh: Mesh, how: Split, letters: Sequence[str]) -> tuple[NamedSharding, ...]:
        return tuple(NamedSharding(mesh, how.spec(one)) for one in letters)

    def infer(mesh: Mesh, given: Sequence[Any], _: Any) -> Any:
        return shardings(mesh, find(mesh, given), axes.results)

    def partition(mesh: Mesh, given: Sequence[Any], _: Any) -> Any:
        how = find(mesh, given)

        def part(*given: Array) -> tuple[Array, ...]:
            return how.run(function, axes, *given[:count])

        return mesh, part, shardings(mesh, how, axes.results), shardings(mesh, how, operands)

    call = custom_partitioning(whole)
    rule, replicated = _rule(axes, everything)
    call.def_partition(
        partition, infer_sharding_from_operands=infer, sharding_rule=rule, need_replication_factors=replicated
    )
    return tuple(call(*everything))


def _calls_back(program: Jaxpr) -> bool:
    here = any(equation.primitive.name == "pure_callback" for equation in program.eqns)
    return here or any(map(_calls_back, subjaxprs(program)))


def _rule(axes: Axes, arrays: Sequence[Array]) -> tuple[str, tuple[str, ...]]:
    """How shardings spread between operands and results, as Shardy writes it, and what of it is on every device."""
    # Key heads follow from query heads in `Split`. Shardy could be told "(k g)" for N, but then splits mesh axes
    # themselves where k is too small for them, which no PartitionSpec can say.
    further = enumerate(arrays[len(axes.operands) :])
    operands = [*map(list, axes.operands), *([f"further{n}_{axis}" for axis in range(x.ndim)] for n, x in further)]
    results = list(map(list, axes.results))
    replicated = [name.lower() for one in operands + results for name in one if name in WHOLE or len(name) > 1]
    left, right = (", ".join(map(" ".join, side)).lower() for side in (operands, results))
    return f"{left} -> {right}", tuple(dict.fromkeys(replicated))


# -- mesh axes of type Explicit ----------------------------------------------------------------------------------------


def explicit(
    function: Function, axes: Axes, *arrays: Array, names: Sequence[str] = (), keep: bool = False
) -> tuple[Array, ...]:
    """`function(*arrays)`, split as the arrays' types say they are sharded.

    Args:
      function: of a device's parts; uses no traced array but its arguments. It may be differentiated.
      axes: of the first arrays and of all results. Further arrays are whole on every device.
      names: of the first arrays, for who gives them.
      keep: whether the function is hashable, and what it is compiled to may be kept for calls outside `jax.jit`.

    Raises:
      ArgumentError: an axis is sharded that devices need whole.
    """
    found = _explicit_split(axes, arrays, names)
    if found is None:
        return tuple(function(*arrays))
    mesh, how = found
    letters = axes.letters(len(arrays))
    run = (_kept if keep else _shard_map)(function, axes, mesh, how, letters)
    return tuple(run(*_resharded(mesh, how, letters, arrays)))


def _shard_map(function: Function, axes: Axes, mesh: Any, how: Split, letters: tuple[str, ...]) -> Function:
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    over = {name for name, kind in kinds.items() if kind == AxisType.Explicit}
    return jax.shard_map(
        partial(how.run, function, axes),
        mesh=mesh,
        in_specs=tuple(map(how.spec, letters)),
        out_specs=tuple(map(how.spec, axes.results)),
        # None stands for all. They are not named: inside `jax.vmap` over a sharded axis, JAX wants that axis left out.
        axis_names=over if len(over) < len(kinds) else set(),
    )


@lru_cache(maxsize=64)
def _kept(*of: Any) -> Function:
    return jax.jit(_shard_map(*of))


def alike(axes: Axes, *arrays: Array, names: Sequence[str] = ()) -> tuple[Array, ...]:
    """The arrays as operands of one operation: sharded alike, and varying over the same axes inside shard_map.

    Args:
      axes: of the operation.
      names: of the arrays, for who gives them.

    Raises:
      ArgumentError: an axis is sharded that devices need whole.
    """
    arrays = tuple(vary_like(x, *arrays) for x in arrays)
    found = _explicit_split(axes, arrays, names)
    return arrays if found is None else _resharded(*found, axes.operands, arrays)


def _explicit_split(axes: Axes, arrays: Sequence[Array], names: Sequence[str]) -> tuple[Any, Split] | None:
    """The mesh that the arrays lie on, and how its axes split the operands; None where no array is sharded."""
    types = [jax.typeof(x).sharding for x in arrays]
    mesh = next((one.mesh for one in types if any(one.spec)), None)
    if mesh is None:
        return None
    specs = [one.spec for one in types[: len(axes.operands)]]
    how = Split.find(axes, arrays, specs, mesh.shape)
    for name, letters, spec in zip(names, axes.operands, specs, strict=False):
        _check_kept(name, letters, spec, how)
    return mesh, how


def _resharded(mesh: Any, how: Split, letters: Sequence[str], arrays: Sequence[Array]) -> tuple[Array, ...]:
    wanted = (NamedSharding(mesh, how.spec(one)) for one in letters)
    return tuple(jax.sharding.reshard(x, sharding) for x, sharding in zip(arrays, wanted, strict=True))


#: Why an axis has to be whole on every device.
_REASONS = {
    **dict.fromkeys("TS", "positions cannot be split (but see docs/ops.md, Several devices)"),
    "H": "elements of heads cannot be split",
    "W": "heads whose patterns differ, and values of rows, cannot be split",
    "N": "heads are split into equal parts that share no key head, over the same devices in all arrays",
}


def _check_kept(name: str, letters: str, spec: PartitionSpec, how: Split) -> None:
    for letter, entry in zip(letters.replace("K", "N"), spec, strict=False):
        if _names(entry) and _names(entry) != how.over.get(letter):
            why = _REASONS.get(letter, "batch entries are split into equal parts, over the same devices in all arrays")
            raise ArgumentError(
                f"{name} is sharded as {spec}, but {why}. Give jax.sharding.reshard({name}, {how.spec(letters)}), or "
                "use mesh axes of type Auto."
            )


# -- inside shard_map --------------------------------------------------------------------------------------------------


def whole(array: Array) -> Array:
    """On every device, where its type says that it is split."""
    sharding = jax.typeof(array).sharding
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec())) if any(sharding.spec) else array


def vary_like(value: Array, *others: Array) -> Array:
    """`value` marked as varying over the mesh axes that `others` vary over (inside shard_map; else unchanged)."""
    missing = tuple(frozenset().union(*map(varying, others)) - varying(value))
    return lax.pcast(value, missing, to="varying") if missing else value


def varying(value: Array) -> frozenset[str]:
    """The mesh axes over which `value` varies inside shard_map; jax 0.10 and later."""
    return getattr(getattr(jax.typeof(value), "mat", None), "varying", frozenset())


__all__ = ["Axes", "Split", "alike", "explicit", "partitioned", "vary_like", "varying", "whole"]
