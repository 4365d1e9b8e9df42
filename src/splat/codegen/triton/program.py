"""Attention and its gradients as a sequence of kernel launches that follows the plan, for any binding.

Inside, log-sum-exp and delta are [B, N, T], float32; query, key and value lie as the binding's framework has them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from splat.codegen.base import Options
from splat.codegen.scalars import Modification
from splat.codegen.triton import generate
from splat.codegen.triton.generate import Variant
from splat.codegen.triton.kernels import SPLAT_DELTA
from splat.codegen.triton.launch import Kernel, Launch, Launcher, Output
from splat.codegen.triton.lower import PassSpec, Tables, lower
from splat.codegen.triton.parts import in_parts, undivided
from splat.pattern.core import array_namespace, ceil_div
from splat.planning import Plan, Target, parts_of
from splat.planning.kernels import KernelConfig, find_config

#: Static facts and tables of a pass, and of every pass.
OnePass = tuple[PassSpec, Tables]
Passes = Sequence[OnePass]

#: Array's name in a kernel -> elements from one batch entry, head and position to the next.
Strides = dict[str, tuple[int, int, int]]

#: The tables that kernels of a pass read, in the order of their parameters.
TABLES = ("TILES", "ROWS", "BOUNDS", "WALKS")

#: Rows of a program that merges passes or makes delta; they are bound by memory.
MERGE_ROWS = 32

#: Warps that a multiprocessor runs at once, about: registers and shared memory of most configurations allow no more.
RESIDENT_WARPS = 8


@dataclasses.dataclass(frozen=True)
class Binding:
    """What a framework brings.

    Attributes:
      launch: carries out a launch.
      strides: elements from one batch entry, head and position of a 4-D array to the next.
      shape: (batch, heads, length, width) -> the shape of such an array.
      table: a NumPy (or traced) int32 table as an array of the framework.
      full: (shape, dtype, value) -> an array.
      allow_tf32: whether float32 matrix products may round their inputs to tf32.
      descriptors: whether kernels may make tensor memory descriptors.
    """

    launch: Launcher
    strides: Callable[[Any], tuple[int, int, int]]
    shape: Callable[[int, int, int, int], tuple[int, ...]]
    table: Callable[[Any], Any]
    full: Callable[[tuple[int, ...], str, float], Any]
    allow_tf32: bool = False
    descriptors: bool = False


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one call; heads and batch may differ from the plan's problem (vmap, heads with patterns of their own)."""

    batch: int
    q_len: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def group(self) -> int:
        return self.num_q_heads // self.num_kv_heads


class Earlier(NamedTuple):
    """What a pass merges into its results: SLOTS [passes, rows], each pass's results and its number of slot rows."""

    slots: Any
    arrays: tuple[Any, ...]
    counts: tuple[int, ...]


class Guards(NamedTuple):
    """Positions that are in no pair, and yet in tiles: NaN and infinity there must reach no result.

    Attributes:
      holes: some key between the first and the last that are attended to is not; forward and dQ zero it.
      unused: some query or key is in no pair at all; dK and dV zero it.
    """

    holes: bool
    unused: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Attention calls of one size: static options, bound to a framework.

    Attributes:
      target: what the kernels are for; it chooses their configurations, and in how many parts passes are run.
      guards: what must be zeroed, whatever it holds.
      modification: what becomes of scores, if anything.
    """

    options: Options
    sizes: Sizes
    target: Target
    guards: Guards
    binding: Binding
    modification: Modification | None = None

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(
        self, passes: Passes, query: Any, key: Any, value: Any, lengths: Any = None, place: Sequence[Any] = ()
    ) -> tuple[Any, Any]:
        """(output in the query's dtype, log-sum-exp float32 [B, N, T]).

        `place`: where scores are, int32 [B, N, 3], and what the score modification closes over, where there is one.
        """
        s = self.sizes
        if not passes:
            out = self.binding.full(self.binding.shape(s.batch, s.num_q_heads, s.q_len, s.head_dim), s.dtype, 0.0)
            return out, self.binding.full((s.batch, s.num_q_heads, s.q_len), "float32", float("-inf"))

        passes = [self._in_parts(one) for one in passes]

        def run(one: OnePass, partial: bool, earlier: Earlier) -> Any:
            spec, _ = one
            out, strides = self._result(spec, partial, s.num_q_heads, s.q_len)
            lse = Output((s.batch, s.num_q_heads, spec.result_rows if partial else s.q_len), "float32")
            scale, sign = self._scale()
            variant = self._variant(partial, earlier, lengths, parts=spec.parts > 1)
            return self._launch(
                "forward", generate.forward(spec.facts, variant), one, s.num_q_heads, (query, key, value), earlier,
                lengths, place, self._strides(q=query, k=key, v=value) | {"out": strides}, (s.q_len,),
                (scale, self._soft_cap()), (out, lse), GUARD=self.guards.holes, SIGN=sign,
            )  # fmt: skip

        out, lse = self._each(passes, run, s.num_q_heads, s.q_len, with_lse=True)
        return out, lse

    # -- backward ------------------------------------------------------------------------------------------------------

    def backward(
        self,
        passes: Passes,
        transposed: Passes,
        query,
        key,
        value,
        lengths,
        out,
        lse,
        d_out,
        d_lse=None,
        place: Sequence[Any] = (),
    ) -> tuple[Any, Any, Any]:
        """(d_query, d_key, d_value) in the inputs' dtype; `lse` and `d_lse` are float32 [B, N, T].

        `passes` are the plan's for dQ, `transposed` those for dK and dV; `place` as for the forward.
        """
        delta = self._delta(out, d_out, lse, d_lse)
        saved = (query, key, value, d_out, lse, delta)
        d_query = self._d_query(passes, saved, lengths, place)
        return (d_query, *self._d_key_value(transposed, saved, lengths, place))

    def _delta(self, out: Any, d_out: Any, lse: Any, d_lse: Any) -> Any:
        s, blocks = self.sizes, ceil_div(self.sizes.q_len, MERGE_ROWS)
        strides, steps = addresses(self._strides(out=out, do=d_out))
        constants = dict(
            **steps, NUM_HEADS=s.num_q_heads, HAS_DLSE=d_lse is not None, BLOCK=MERGE_ROWS, HEAD_DIM=s.head_dim,
            WIDTH=self._width,
        )  # fmt: skip
        (delta,) = self.binding.launch(
            Launch(
                SPLAT_DELTA, blocks * s.batch * s.num_q_heads, (out, d_out, lse if d_lse is None else d_lse),
                (*strides, s.q_len, blocks), (Output((s.batch, s.num_q_heads, s.q_len), "float32"),),
                constants, num_warps=4, num_stages=1,
            )
        )  # fmt: skip
        return delta

    def _d_query(self, passes: Passes, saved: Sequence[Any], lengths: Any, place: Sequence[Any]) -> Any:
        s = self.sizes
        if not passes:
            return self.binding.full(self.binding.shape(s.batch, s.num_q_heads, s.q_len, s.head_dim), s.dtype, 0.0)

        def run(one: OnePass, partial: bool, earlier: Earlier) -> Any:
            result, strides = self._result(one[0], partial, s.num_q_heads, s.q_len)
            kernel = generate.d_query(one[0].facts, self._variant(partial, earlier, lengths))
            return self._launch(
                "d_query", kernel, one, s.num_q_heads, saved, earlier, lengths, place,
                self._saved_strides(saved) | {"dq": strides}, (s.q_len,), (self.options.scale, self._soft_cap()),
                (result,), GUARD=self.guards.holes,
            )  # fmt: skip

        return self._each(passes, run, s.num_q_heads, s.q_len)[0]

    def _d_key_value(self, passes: Passes, saved: Sequence[Any], lengths: Any, place: Sequence[Any]) -> tuple[Any, Any]:
        s = self.sizes
        if not passes:
            shape = self.binding.shape(s.batch, s.num_kv_heads, s.kv_len, s.head_dim)
            return self.binding.full(shape, s.dtype, 0.0), self.binding.full(shape, s.dtype, 0.0)

        def run(one: OnePass, partial: bool, earlier: Earlier) -> Any:
            result, strides = self._result(one[0], partial, s.num_kv_heads, s.kv_len)
            variant = self._variant(partial, earlier, lengths, grouped=s.group > 1)
            return self._launch(
                "d_key_value", generate.d_key_value(one[0].facts, variant), one, s.num_kv_heads, saved, earlier,
                lengths, place, self._saved_strides(saved) | {"dk": strides, "dv": strides}, (s.kv_len,),
                (s.q_len, self.options.scale, self._soft_cap()), (result, result),
                GUARD=self.guards.unused or lengths is not None,
            )  # fmt: skip

        d_key, d_value = self._each(passes, run, s.num_kv_heads, s.kv_len)
        return d_key, d_value

    # -- passes --------------------------------------------------------------------------------------------------------

    def _each(self, passes: Passes, run: Callable[..., Any], heads: int, length: int, *, with_lse: bool = False) -> Any:
        """Runs all passes. The last merges the others' results into its own if it has every row; else a kernel does."""
        *first, last = passes
        nothing = Earlier(None, (), ())
        parts = [run(one, True, nothing) for one in first]
        if not last[0].facts.covers_rows or last[0].parts > 1:
            return self._merged(passes, [*parts, run(last, True, nothing)], heads, length, with_lse=with_lse)
        for n, (spec, tables) in enumerate(first):
            if spec.parts > 1:
                first[n] = undivided(spec), tables
                parts[n] = self._merged_slots((spec, tables), parts[n], heads)
        return run(last, False, self._earlier(first, parts, with_lse) if first else nothing)

    def _earlier(self, passes: Passes, parts: Sequence[Sequence[Any]], with_lse: bool) -> Earlier:
        every = [tables["SLOTS"] for _, tables in passes]
        slots = self.binding.table(array_namespace(*every).stack(every))
        # Log-sum-exp is the last result, but the kernels want it first.
        arrays = [x for part in parts for x in ((part[-1], *part[:-1]) if with_lse else part)]
        return Earlier(slots, tuple(arrays), tuple(spec.result_rows for spec, _ in passes))

    # -- one launch ----------------------------------------------------------------------------------------------------

    def _launch(
        self, which: str, kernel: Kernel, one: OnePass, heads: int, arrays: Sequence[Any], earlier: Earlier,
        lengths: Any, place: Sequence[Any], strides: Strides, length: tuple[int], scalars: Sequence[int | float],
        outputs: tuple[Output, ...], **constants: Any,
    ) -> Any:  # fmt: skip
        s, (spec, tables) = self.sizes, one
        read = [self.binding.table(tables[name]) for name in TABLES if name in tables]
        read += [] if lengths is None else [lengths]
        read += place
        read += [] if earlier.slots is None else [earlier.slots, *earlier.arrays]
        config = self._config(which, spec)
        described = config.descriptors and spec.is_long and self.binding.descriptors and self._describable(strides)
        heads_at, steps = addresses(strides)
        constants = dict(
            **steps, NUM_HEADS=s.num_q_heads, GROUP=s.group, TILE_ROWS=spec.tile_rows, BLOCK_Q=spec.block_q,
            BLOCK_KV=spec.block_kv, HEAD_DIM=s.head_dim, WIDTH=self._width, WIDE=self._is_wide(strides),
            DESCRIPTORS=described, PRECISION=self._precision,
            SOFT_CAP=self.options.logits_soft_cap is not None, **constants,
        )  # fmt: skip
        return self.binding.launch(
            Launch(
                kernel, spec.num_slots * s.batch * heads, (*arrays, *read),
                (*heads_at, spec.num_slots, spec.num_walks, *length, *earlier.counts, *scalars), outputs, constants,
                config.num_warps, config.num_stages,
            )
        )  # fmt: skip

    def _variant(self, partial: bool, earlier: Earlier, lengths: Any, **more: bool) -> Variant:
        return Variant(
            partial, len(earlier.counts), lengths is not None, score_mod=self.modification, **more
        )  # fmt: skip

    def _config(self, which: str, spec: PassSpec) -> KernelConfig:
        s = self.sizes
        return find_config(self.target.arch, which, s.head_dim, s.dtype, spec.block_q, spec.block_kv)

    def _result(self, spec: PassSpec, partial: bool, heads: int, length: int) -> tuple[Output, tuple[int, int, int]]:
        """A result array and its strides: by row, or float32 [B, heads, slot rows, H] to be merged."""
        s = self.sizes
        if partial:
            count = spec.result_rows
            shape = (s.batch, heads, count, s.head_dim)
            return Output(shape, "float32"), (heads * count * s.head_dim, count * s.head_dim, s.head_dim)
        output = Output(self.binding.shape(s.batch, heads, length, s.head_dim), s.dtype)
        return output, self.binding.strides(output)

    def _merged(self, passes: Passes, parts: Any, heads: int, length: int, *, with_lse: bool = False) -> Sequence[Any]:
        """Results by row from results by slot: summed, or weighted by their log-sum-exp (which is then the last)."""
        slots = self._earlier(passes, parts, with_lse).slots
        output = Output(self.binding.shape(self.sizes.batch, heads, length, self.sizes.head_dim), self.sizes.dtype)
        return self._merge(
            [spec for spec, _ in passes], slots, parts, heads, length, output, self.binding.strides(output), with_lse
        )  # fmt: skip

    def _merged_slots(self, one: OnePass, part: Sequence[Any], heads: int) -> Sequence[Any]:
        """Results by slot from those of parts of slots: what the pass gives where it is not divided."""
        spec = undivided(one[0])
        output, strides = self._result(spec, True, heads, 0)
        count = spec.result_rows
        slots = self.binding.table(np.arange(count, dtype=np.int32)[None])
        return self._merge([one[0]], slots, [part], heads, count, output, strides, True)

    def _merge(
        self, specs: Sequence[PassSpec], slots: Any, parts: Any, heads: int, length: int, output: Output,
        strides: tuple[int, int, int], with_lse: bool,
    ) -> Sequence[Any]:  # fmt: skip
        s, blocks = self.sizes, ceil_div(length, MERGE_ROWS)
        results = len(parts[0]) - with_lse
        lses = [part[-1] for part in parts] if with_lse else []
        counts = [spec.result_rows for spec in specs]
        kernel = generate.combine(len(specs), results, with_lse)
        if any(spec.parts > 1 for spec in specs):
            kernel = generate.merge_parts(len(specs))
            counts += [spec.parts for spec in specs]
        heads_at, steps = addresses({"out": strides})
        outputs = (output,) * results + ((Output((s.batch, heads, length), "float32"),) if with_lse else ())
        return self.binding.launch(
            Launch(
                kernel, blocks * s.batch * heads, (slots, *lses, *(x for part in parts for x in part[:results])),
                (*counts, length, blocks, *heads_at), outputs,
                dict(**steps, NUM_HEADS=heads, BLOCK=MERGE_ROWS, HEAD_DIM=s.head_dim, WIDTH=self._width),
                num_warps=4, num_stages=1,
            )
        )  # fmt: skip

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _in_parts(self, one: OnePass) -> OnePass:
        """The forward's pass, divided where it has fewer programs than the target has multiprocessors."""
        s, (spec, tables) = self.sizes, one
        config = self._config("forward", spec)
        resident = max(RESIDENT_WARPS // config.num_warps, 1)
        parts = parts_of(spec.num_slots * s.batch * s.num_q_heads, spec.longest, self.target.units, resident)
        return in_parts(spec, tables, parts, s.q_len) if parts > 1 else one

    # -- facts ---------------------------------------------------------------------------------------------------------

    def _strides(self, **arrays: Any) -> Strides:
        return {name: self.binding.strides(array) for name, array in arrays.items()}

    def _saved_strides(self, saved: Sequence[Any]) -> Strides:
        query, key, value, d_out, *_ = saved
        return self._strides(q=query, k=key, v=value, do=d_out)

    def _is_wide(self, strides: Strides) -> bool:
        """Whether offsets within a block may pass 2^31 elements."""
        s = self.sizes
        return max(step for _, _, step in strides.values()) * max(s.q_len, s.kv_len) >= 1 << 31

    def _describable(self, strides: Strides) -> bool:
        """Whether tensor memory descriptors can describe the arrays: all addresses multiples of 16 bytes."""
        size = {"float32": 4}.get(self.sizes.dtype, 2)
        every = [self.sizes.head_dim, *(stride for triple in strides.values() for stride in triple)]
        return all(stride * size % 16 == 0 for stride in every)

    @property
    def _width(self) -> int:
        return max(16, 1 << (self.sizes.head_dim - 1).bit_length())

    @property
    def _precision(self) -> str:
        return "tf32" if self.binding.allow_tf32 and self.sizes.dtype == "float32" else "ieee"

    def _scale(self) -> tuple[float, int]:
        """(scale > 0, factor of q): kernels look for the largest score before they scale it, if they can."""
        scale = self.options.scale
        if self.modification is not None:
            return scale, 1
        return (abs(scale), 1 if scale > 0 else -1) if scale else (1.0, 0)

    def _soft_cap(self) -> float:
        return self.options.logits_soft_cap or 1.0


def addresses(strides: Strides) -> tuple[tuple[int, ...], dict[str, int]]:
    """(batch and head strides in units, in the order of the kernels' parameters; the constants that go with them).

    Compilers must know what addresses are multiples of, or they copy element by element; and not every binding tells
    them of scalars. So positions' strides are constants, and the others, which depend on lengths, come in units.
    """
    unit = math.gcd(16, *(stride for b, h, _ in strides.values() for stride in (b, h)))
    scalars = tuple(stride // unit for b, h, _ in strides.values() for stride in (b, h))
    return scalars, {f"{name.upper()}_T": step for name, (_, _, step) in strides.items()} | {"UNIT": unit}


def passes_of(plan: Plan, which: str) -> Passes:
    """The passes of a static plan's "forward", "d_query" or "d_key_value" schedule; remembered."""

    def make() -> Passes:
        return tuple(zip(*lower(getattr(plan, which)), strict=True))

    return plan.remembered(("triton", which), make)


#: Of plans whose numbers are not known yet.
UNKNOWN = Guards(True, True)


def guards_of(plan: Plan) -> Guards:
    """What a static plan's kernels must guard against."""
    first, stop, count = plan.acsr.seen_columns
    return Guards(stop - first > count, plan.empty_rows > 0 or count < plan.problem.kv_len)
