"""Calls of compiled kernels through ctypes: `include/splat/call.hpp` in Python, for arrays of any framework."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from splat.codegen.base import Options
from splat.codegen.cpp import amx, compiler
from splat.codegen.cpp.generate import KernelFacts, library_name, source
from splat.codegen.cpp.lower import UNKNOWN, Holes, PassFacts, counts_of, holes_of, passes_of
from splat.codegen.scalars import Modification
from splat.planning import Plan

#: Address, and elements from one batch entry, position and head to the next.
Placed = tuple[int, int, int, int]


#: The arrays of a call, in the order of `splat::Call`; and one that is not there.
ARRAYS = ("query", "key", "value", "out", "d_out", "lse", "d_lse", "d_query", "d_key", "d_value")
NOWHERE: Placed = (0, 0, 0, 0)


class Array(ctypes.Structure):
    """`splat::Array`."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "position", "head")))


class Call(ctypes.Structure):
    """`splat::Call`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "q_len", "kv_len", "num_q_heads", "num_kv_heads")),
        ("scale", ctypes.c_double), ("soft_cap", ctypes.c_double),
        *((name, Array) for name in ARRAYS),
        *((name, ctypes.c_void_p) for name in ("kv_lengths", "tables", "num_groups", "where", "arrays")),
    )  # fmt: skip


#: The same, of numbers one after the other: quicker to make.
PACKED = struct.Struct(f"@5q2d{4 * len(ARRAYS)}q5q")


def kernel_facts(
    kernel: str,
    passes: tuple[PassFacts, ...],
    holes: Holes,
    *,
    dtype: str,
    head_dim: int,
    soft_cap: bool,
    lengths: bool,
    score_mod: Modification | None = None,
) -> KernelFacts:
    """Everything static about a kernel. With key lengths a query may be in no pair although the pattern has some."""
    guard = holes.queries or lengths if kernel == "d_key_value" else holes.keys
    tiles = dtype == "bfloat16" and score_mod is None and amx.is_granted()
    if kernel == "decode":  # one text for all plans: it reads what is kept and no more, without matrix tiles
        guard, passes, tiles = False, (), False
    return KernelFacts(kernel, dtype, head_dim, soft_cap, guard, passes, tiles, score_mod)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A compiled kernel with the tables of a static plan; several threads may call it at once."""

    run: Any
    options: Options
    tables: list[np.ndarray]
    pointers: Any
    counts: Any

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self.tables)

    def __call__(
        self, arrays: Mapping[str, Placed], kv_lengths: int | None, sizes: tuple[int, ...], threads: int,
        team: int | None = None,
    ) -> None:  # fmt: skip
        """Runs the kernel.

        Args:
          arrays: by their names in `Call`.
          kv_lengths: the address of int32 [batch].
          sizes: batch, q_len, kv_len, num_q_heads, num_kv_heads.
          threads: how many to use.
          team: the address of an OpenMP runtime's `GOMP_parallel`, whose threads they are; None: they are made for
            the call.
        """
        scale, soft_cap = self.options.scale, self.options.logits_soft_cap or 0.0
        places = [number for name in ARRAYS for number in arrays.get(name, NOWHERE)]
        tables = ctypes.addressof(self.pointers), ctypes.addressof(self.counts)
        self.run(PACKED.pack(*sizes, scale, soft_cap, *places, kv_lengths or 0, *tables, 0, 0), threads, team)


@lru_cache(maxsize=512)
def _library(facts: KernelFacts, settings: tuple[str | None, ...]) -> ctypes.CDLL:
    return compiler.load(library_name(facts), source(facts))


def prepare(plan: Plan, options: Options, kernel: str, *, lengths: bool) -> Prepared | None:
    """Compiles and loads a kernel of a static plan; None where it has nothing to do.

    Raises what `compiler.load` raises.
    """
    passes, tables = passes_of(plan, kernel)
    if not tables:
        return None
    p = plan.problem
    soft_cap = options.logits_soft_cap is not None
    holes = UNKNOWN if kernel == "decode" else holes_of(plan)
    facts = kernel_facts(kernel, passes, holes, dtype=p.dtype, head_dim=p.head_dim, soft_cap=soft_cap, lengths=lengths)
    return _bound(facts, options, [table for one in tables for table in one], counts_of(kernel, tables))


def prepare_decode(runs: np.ndarray, options: Options, *, dtype: str, head_dim: int, lengths: bool) -> Prepared | None:
    """The kernel `decode` of RUNS, int32 [batch, rows, 3 * components], each sequence with its own (or [1, ...]: all
    alike); None where there is no component. Raises what `compiler.load` raises."""
    sequences, rows, numbers = runs.shape
    if not numbers:
        return None
    soft_cap = options.logits_soft_cap is not None
    facts = kernel_facts("decode", (), UNKNOWN, dtype=dtype, head_dim=head_dim, soft_cap=soft_cap, lengths=lengths)
    return _bound(facts, options, [runs], [numbers // 3, rows if sequences > 1 else 0])


def _bound(facts: KernelFacts, options: Options, tables: list[Any], numbers: list[int]) -> Prepared:
    library = _library(facts, compiler.settings())
    flat = [np.ascontiguousarray(table, np.int32) for table in tables]
    pointers = (ctypes.c_void_p * len(flat))(*(table.ctypes.data for table in flat))
    counts = (ctypes.c_int64 * len(numbers))(*numbers)
    run = library.splat_run
    run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p), ctypes.c_int
    return Prepared(run, options, flat, pointers, counts)
