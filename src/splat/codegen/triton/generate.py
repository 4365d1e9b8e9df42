"""The generated kernels: one flat text per pass and direction, made of the calls of `kernels/`.

What depends on the pattern is spelled out here: which components there are, their strides, which phases they have and
what a masked phase compares. Sizes are compile-time parameters. Equal facts give one kernel, whatever the lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from splat.codegen.scalars import Modification
from splat.codegen.triton import score_mod
from splat.codegen.triton.launch import Kernel
from splat.codegen.triton.lower import PassFacts, WalkFacts
from splat.codegen.triton.source import load
from splat.tiling import Test


@dataclasses.dataclass(frozen=True)
class Variant:
    """What else the text depends on.

    Attributes:
      partial: results go to slots (to be merged), not to their rows.
      earlier: so many passes' results are merged into this one's.
      lengths: there are run-time key lengths.
      grouped: several query heads share a key head.
      parts: a slot has no more rows in the results than its tile.
      score_mod: what becomes of scores, if anything.
    """

    partial: bool = False
    earlier: int = 0
    lengths: bool = False
    grouped: bool = False
    parts: bool = False
    score_mod: Modification | None = None


@lru_cache(maxsize=512)
def forward(facts: PassFacts, variant: Variant) -> Kernel:
    """Arrays Q, K, V, tables; outputs OUT, LSE."""
    return _kernel("splat_forward", _forward_text(facts, variant), facts, _modification(variant, "value"))


@lru_cache(maxsize=512)
def d_query(facts: PassFacts, variant: Variant) -> Kernel:
    """Arrays Q, K, V, DO, LSE, DELTA, tables; output DQ."""
    return _kernel("splat_d_query", _d_query_text(facts, variant), facts, _modification(variant, "with_slope"))


@lru_cache(maxsize=512)
def d_key_value(facts: PassFacts, variant: Variant) -> Kernel:
    """Arrays Q, K, V, DO, LSE, DELTA, tables of the transposed schedule; outputs DK, DV."""
    return _kernel("splat_d_key_value", _d_key_value_text(facts, variant), facts, _modification(variant, "with_slope"))


@lru_cache(maxsize=64)
def combine(passes: int, results: int, with_lse: bool) -> Kernel:
    """Arrays SLOTS, then each pass's results (and log-sum-exp first, where merged through it); outputs the sums."""
    name = "splat_merge" if with_lse else "splat_sum"
    return load(name, "\n".join(_combine_lines(name, passes, results, with_lse)) + "\n")


@lru_cache(maxsize=64)
def merge_parts(passes: int) -> Kernel:
    """As `combine` with log-sum-exp, of passes in parts: how many of each is an argument."""
    return load("splat_merge", "\n".join(_merge_parts_lines("splat_merge", passes)) + "\n")


# -- text --------------------------------------------------------------------------------------------------------------

_SHAPE = "BLOCK_KV, HEAD_DIM, WIDTH, WIDE, DESCRIPTORS, PRECISION"
_CONSTANTS = (
    "NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, "
    "BLOCK_KV: tl.constexpr,",
    "HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr, "
    "PRECISION: tl.constexpr,",
)


def _strides(*names: str) -> str:
    """Parameters of the addresses of arrays: strides of batch entries and heads in units of UNIT elements."""
    return ", ".join(f"{name}_{axis}" for name in names for axis in "bh")


def _steps(*names: str) -> str:
    """Constants of the addresses of arrays: strides of positions. The compiler must know what they are multiples of."""
    return ", ".join(f"{name}_T: tl.constexpr" for name in (name.upper() for name in names)) + ", UNIT: tl.constexpr"


def tables_of(facts: PassFacts, variant: Variant, results: Sequence[str]) -> list[str]:
    """The tables and earlier results that a kernel reads, in the order of its parameters."""
    wanted = {
        "TILES": True,
        "ROWS": facts.step is None,
        "BOUNDS": facts.has_tests,
        "WALKS": facts.looped is not None,
        "LENGTHS": variant.lengths,
    }
    tables = [name for name, here in wanted.items() if here]
    tables += _operands(variant)
    tables += ["SLOTS"] if variant.earlier else []
    return tables + [f"{result}{n}" for n in range(variant.earlier) for result in results]


def _modification(variant: Variant, which: str) -> Sequence[str]:
    """The text of the score modification."""
    return () if variant.score_mod is None else tuple(score_mod.text(variant.score_mod, which))


def _operands(variant: Variant) -> list[str]:
    """The score modification's arrays."""
    return [] if variant.score_mod is None else ["WHERE", *(f"A{n}" for n in range(len(variant.score_mod.arrays)))]


def _place(variant: Variant, pair: str) -> Iterator[str]:
    """Where the scores of a head are, for the modification."""
    if variant.score_mod is not None:
        _, *arrays = _operands(variant)
        yield f"    of_batch, of_head, offset = where_of(WHERE, {pair})"
        yield f"    place = ({', '.join(['of_batch', 'of_head', 'offset', *arrays])})"


def _signature(
    name: str, arrays: Sequence[str], addressed: Sequence[str], scalars: str, outputs: str, constants: str
) -> list[str]:
    lines = ["@triton.jit", f"def {name}({', '.join(arrays)},"]
    indent = " " * (len(name) + 5)
    lines += [f"{indent}{line}," for line in (_strides(*addressed), scalars, outputs, _steps(*addressed))]
    lines += [indent + line for line in _CONSTANTS]
    return [*lines, f"{indent}{constants}):"]


def _counts(variant: Variant) -> str:
    """Parameters: how many slots each earlier pass has."""
    return "".join(f"count{n}, " for n in range(variant.earlier))


def _slots(variant: Variant) -> list[str]:
    return [f"    slots{n} = slots_of(SLOTS, {n}, rows, num_rows)" for n in range(variant.earlier)]


def _prologue(facts: PassFacts, variant: Variant, heads: str) -> list[str]:
    lines = [f"    slot, batch, head = locate(num_slots, {heads})"]
    if facts.step is None:
        lines.append("    rows = rows_by_map(ROWS, slot, BLOCK_Q)")
    else:
        walks = "num_walks" if facts.looped else str(len(facts.walks))
        lines.append(f"    rows = rows_in_steps(TILES, slot, num_rows, {walks}, {facts.step}, TILE_ROWS, BLOCK_Q)")
    if variant.lengths:
        lines.append("    length = tl.load(LENGTHS + batch)")
    return lines


def _target(variant: Variant) -> list[str]:
    """Where results go: `at`, of `count`."""
    if variant.parts:
        return [
            "    at = tl.arange(0, BLOCK_Q)",
            "    count = num_slots * TILE_ROWS",
            "    at = tl.where(at < TILE_ROWS, slot * TILE_ROWS + at, count)",
        ]
    if variant.partial:
        return ["    at = slot * BLOCK_Q + tl.arange(0, BLOCK_Q)", "    count = num_slots * BLOCK_Q"]
    return ["    at = rows", "    count = num_rows"]


def _forward_text(facts: PassFacts, variant: Variant) -> Iterator[str]:
    yield from _signature(
        "splat_forward", ["Q", "K", "V", *tables_of(facts, variant, ["LSE", "X"])],
        ["q", "k", "v", "out"], f"num_slots, num_walks, num_rows, {_counts(variant)}scale, soft_cap", "OUT, LSE",
        "SOFT_CAP: tl.constexpr, GUARD: tl.constexpr, SIGN: tl.constexpr",
    )  # fmt: skip
    yield from _prologue(facts, variant, "NUM_HEADS")
    yield "    q = load_rows(head_of(Q, batch, head, q_b, q_h, UNIT), rows, num_rows, Q_T, HEAD_DIM, WIDTH)"
    yield "    if SIGN != 1:  # the largest score is looked for before it is scaled"
    yield "        q = q * SIGN"
    yield "    keys_of = head_of(K, batch, head // GROUP, k_b, k_h, UNIT)"
    yield "    values_of = head_of(V, batch, head // GROUP, v_b, v_h, UNIT)"
    yield "    top, total, acc = start(BLOCK_Q, WIDTH)"
    yield from _place(variant, "batch * NUM_HEADS + head")
    more = ", rows, residue, place, modify" if variant.score_mod else ""

    def call(begin: str, end: str, bounds: str, stride: str, keep: str, limited: bool) -> str:
        return (
            f"top, total, acc = attend(top, total, acc, q, keys, values, {begin}, {end}, stop, {bounds}, scale, "
            f"soft_cap, K_T, V_T, {stride}, {keep}, {limited}, SOFT_CAP, GUARD, {_SHAPE}{more})"
        )

    sources = {"keys": ("keys_of", "K_T"), "values": ("values_of", "V_T")}
    yield from _walks(facts, sources, call, limited=variant.lengths)
    yield "    pair = batch * NUM_HEADS + head"
    yield from _slots(variant)
    for n in range(variant.earlier):
        which = f"LSE{n}, X{n}, pair, slots{n}, count{n}"
        yield f"    top, total, acc = resume(top, total, acc, {which}, HEAD_DIM, WIDTH)"
    yield "    out, lse = finish(top, total, acc)"
    yield from _target(variant)
    yield "    store_rows(head_of(OUT, batch, head, out_b, out_h, UNIT), out, at, count, OUT_T, HEAD_DIM, WIDTH)"
    yield "    tl.store(LSE + pair.to(tl.int64) * count + at, lse, mask=at < count)"


def _d_query_text(facts: PassFacts, variant: Variant) -> Iterator[str]:
    yield from _signature(
        "splat_d_query", ["Q", "K", "V", "DO", "LSE", "DELTA", *tables_of(facts, variant, ["X"])],
        ["q", "k", "v", "do", "dq"], f"num_slots, num_walks, num_rows, {_counts(variant)}scale, soft_cap", "DQ",
        "SOFT_CAP: tl.constexpr, GUARD: tl.constexpr",
    )  # fmt: skip
    yield from _prologue(facts, variant, "NUM_HEADS")
    yield "    q = load_rows(head_of(Q, batch, head, q_b, q_h, UNIT), rows, num_rows, Q_T, HEAD_DIM, WIDTH)"
    yield "    d_out = load_rows(head_of(DO, batch, head, do_b, do_h, UNIT), rows, num_rows, DO_T, HEAD_DIM, WIDTH)"
    yield "    pair = (batch * NUM_HEADS + head).to(tl.int64)"
    yield '    lse2 = tl.load(LSE + pair * num_rows + rows, mask=rows < num_rows, other=float("inf")) * LOG2E'
    yield "    delta = tl.load(DELTA + pair * num_rows + rows, mask=rows < num_rows, other=0.0)"
    yield "    keys_of = head_of(K, batch, head // GROUP, k_b, k_h, UNIT)"
    yield "    values_of = head_of(V, batch, head // GROUP, v_b, v_h, UNIT)"
    yield "    acc = tl.zeros([BLOCK_Q, WIDTH], tl.float32)"
    yield from _place(variant, "batch * NUM_HEADS + head")
    more = ", rows, residue, place, modify_with_slope" if variant.score_mod else ""

    def call(begin: str, end: str, bounds: str, stride: str, keep: str, limited: bool) -> str:
        return (
            f"acc = d_query(acc, q, d_out, lse2, delta, keys, values, {begin}, {end}, stop, {bounds}, scale, "
            f"soft_cap, K_T, V_T, {stride}, {keep}, {limited}, SOFT_CAP, GUARD, {_SHAPE}{more})"
        )

    sources = {"keys": ("keys_of", "K_T"), "values": ("values_of", "V_T")}
    yield from _walks(facts, sources, call, limited=variant.lengths)
    yield "    acc = acc * scale"
    yield from _slots(variant)
    for n in range(variant.earlier):
        yield f"    acc += partial_rows(X{n}, pair, slots{n}, count{n}, HEAD_DIM, WIDTH)"
    yield from _target(variant)
    yield "    store_rows(head_of(DQ, batch, head, dq_b, dq_h, UNIT), acc, at, count, DQ_T, HEAD_DIM, WIDTH)"


def _d_key_value_text(facts: PassFacts, variant: Variant) -> Iterator[str]:
    yield from _signature(
        "splat_d_key_value",
        ["Q", "K", "V", "DO", "LSE", "DELTA", *tables_of(facts, variant, ["XK", "XV"])],
        ["q", "k", "v", "do", "dk", "dv"],
        f"num_slots, num_walks, num_rows, {_counts(variant)}num_queries, scale, soft_cap",
        "DK, DV", "SOFT_CAP: tl.constexpr, GUARD: tl.constexpr",
    )  # fmt: skip
    yield from _prologue(facts, variant, "NUM_HEADS // GROUP")
    yield "    k = load_rows(head_of(K, batch, head, k_b, k_h, UNIT), rows, num_rows, K_T, HEAD_DIM, WIDTH)"
    yield "    v = load_rows(head_of(V, batch, head, v_b, v_h, UNIT), rows, num_rows, V_T, HEAD_DIM, WIDTH)"
    several = variant.grouped or facts.looped or sum(bool(w.left) + w.full + bool(w.right) for w in facts.walks) > 1
    zeros = "zeros(scale, BLOCK_Q, WIDTH)" if several else "tl.zeros([BLOCK_Q, WIDTH], tl.float32)"
    yield f"    d_k = {zeros}"
    yield f"    d_v = {zeros}"
    if variant.lengths:
        yield "    live = tl.min(rows, 0) < length"
    more = ", rows, place, modify_with_slope" if variant.score_mod else ""

    def call(begin: str, end: str, bounds: str, stride: str, keep: str, limited: bool) -> str:
        return (
            f"d_k, d_v = d_key_value(d_k, d_v, k, v, queries, d_outs, lse_of, delta_of, {begin}, {end}, stop, "
            f"residue, {bounds}, scale, soft_cap, Q_T, DO_T, {stride}, {keep}, SOFT_CAP, GUARD, {_SHAPE}{more})"
        )

    inner = [
        "q_head = head * GROUP + member" if variant.grouped else "q_head = head",
        "pair = (batch * NUM_HEADS + q_head).to(tl.int64)",
        "lse_of = LSE + pair * num_queries",
        "delta_of = DELTA + pair * num_queries",
        "queries_of = head_of(Q, batch, q_head, q_b, q_h, UNIT)",
        "d_outs_of = head_of(DO, batch, q_head, do_b, do_h, UNIT)",
    ]
    sources = {"queries": ("queries_of", "Q_T"), "d_outs": ("d_outs_of", "DO_T")}
    body = [*(f"    {line}" for line in inner), *_place(variant, "batch * NUM_HEADS + q_head")]
    body += _walks(facts, sources, call, limited=False, live=variant.lengths)
    if variant.grouped:
        # Left to itself, the compiler makes what every member needs ahead of the loop, and spills it.
        yield "    for member in tl.range(0, GROUP, disable_licm=True):"
        body = ["    " + line for line in body]
    yield from body
    yield "    d_k = d_k * scale"
    if variant.lengths:
        yield "    d_k = tl.where((rows < length)[:, None], d_k, 0.0)"
        yield "    d_v = tl.where((rows < length)[:, None], d_v, 0.0)"
    if variant.earlier:
        yield "    pair = batch * (NUM_HEADS // GROUP) + head"
    yield from _slots(variant)
    for n in range(variant.earlier):
        for result in ("k", "v"):
            where = f"X{result.upper()}{n}, pair, slots{n}, count{n}"
            yield f"    d_{result} += partial_rows({where}, HEAD_DIM, WIDTH)"
    yield from _target(variant)
    yield "    store_rows(head_of(DK, batch, head, dk_b, dk_h, UNIT), d_k, at, count, DK_T, HEAD_DIM, WIDTH)"
    yield "    store_rows(head_of(DV, batch, head, dv_b, dv_h, UNIT), d_v, at, count, DV_T, HEAD_DIM, WIDTH)"


def _walks(facts: PassFacts, sources: dict[str, tuple[str, str]], call: Any, *, limited: bool, live: bool = False):
    """The lines that run all walks; `call` makes one phase."""
    if facts.looped:
        stride, tests = facts.looped
        both = tuple(Test(n, True, True) for n in range(tests))
        generic = WalkFacts(stride or 0, both, True, both)
        yield "    for walk in tl.range(0, num_walks, disable_licm=True):"
        yield f"        walk_of = WALKS + walk * {1 + tests}"
        if stride is None:
            yield "        stride = tl.load(walk_of)"
        yield from (f"        test{n} = 2 * tl.load(walk_of + {1 + n})" for n in range(tests))
        how = "stride" if stride is None else str(stride)
        for line in _walk(generic, "walk", "num_walks", how, sources, call, limited, live, "loop"):
            yield "    " + line
        return
    for n, walk in enumerate(facts.walks):
        yield f"    # walk {n}: columns in steps of {walk.stride}"
        yield from _walk(walk, str(n), str(len(facts.walks)), str(walk.stride), sources, call, limited, live, str(n))


def _walk(walk: WalkFacts, index, count, stride, sources, call, limited, live, name) -> Iterator[str]:
    yield f"    x0, x1, x2, x3, stop, residue = span(TILES, slot, {index}, {count})"
    if live:
        yield "    x0, x1, x2, x3 = skip(live, x0, x1, x2, x3)"
    if limited:
        yield f"    full_end, stop = cut(x1, x2, stop, residue, length, {stride}, BLOCK_KV)"
    for local, (base, step) in sources.items():
        yield (
            f"    {local} = lattice({base}, residue, stop, {step}, {stride}, BLOCK_KV, HEAD_DIM, WIDTH, DESCRIPTORS)"
        )
    if walk.left:
        end = "tl.minimum(x1, stop)" if limited else "x1"
        yield f"    bounds = ({_bounds(walk.left, name)})"
        yield "    " + call("x0", end, "bounds", stride, f"keep_{name}_left", limited)
    if walk.full:
        yield "    " + call("x1", "full_end" if limited else "x2", "None", stride, "None", False)
        if limited:  # the tile that the key lengths cut
            yield "    " + call("full_end", "tl.minimum(x2, stop)", "None", stride, "None", True)
    if walk.right:
        end = "tl.minimum(x3, stop)" if limited else "x3"
        yield f"    bounds = ({_bounds(walk.right, name)})"
        yield "    " + call("x2", end, "bounds", stride, f"keep_{name}_right", limited)


def _sides(tests: Sequence[Test]) -> list[tuple[int, int]]:
    """(test, side) of every bound that the tests compare with."""
    return [(test.component, side) for test in tests for side in (0, 1) if (test.lower, test.upper)[side]]


def _bounds(tests: Sequence[Test], name: str) -> str:
    def which(n: int, side: int) -> str:
        if name == "loop":
            return f"test{n}" + (" + 1" if side else "")
        return str(2 * n + side)

    return " ".join(f"bound(BOUNDS, {which(n, side)}, rows, num_rows)," for n, side in _sides(tests))


def _keep_lines(tests: Sequence[Test], name: str) -> list[str]:
    """A function [rows] bounds, [BLOCK_KV] columns -> bool [rows, BLOCK_KV]: the pairs that the pattern has."""
    terms, at = [], 0
    for test in tests:
        one = []
        if test.lower:
            one.append(f"x[None, :] >= bounds[{at}][:, None]")
            at += 1
        if test.upper:
            one.append(f"x[None, :] < bounds[{at}][:, None]")
            at += 1
        terms.append(_joined(one, " & "))
    body = [f"    return {terms[0]}"]
    if len(terms) > 1:
        body = ["    return (", *(f"        {'| ' if n else ''}({term})" for n, term in enumerate(terms)), "    )"]
    return ["@triton.jit", f"def {name}(x, bounds):", *body, "", ""]


def _joined(terms: Sequence[str], operator: str) -> str:
    return terms[0] if len(terms) == 1 else operator.join(f"({term})" for term in terms)


def _keeps(facts: PassFacts) -> Iterator[str]:
    if facts.looped and not facts.looped[1]:
        return
    if facts.looped:
        both = tuple(Test(n, True, True) for n in range(facts.looped[1]))
        for side in ("left", "right"):
            yield from _keep_lines(both, f"keep_loop_{side}")
        return
    for n, walk in enumerate(facts.walks):
        for side, tests in (("left", walk.left), ("right", walk.right)):
            if tests:
                yield from _keep_lines(tests, f"keep_{n}_{side}")


def _combine_head(name: str, passes: int, results: int, with_lse: bool, counts: Sequence[str]) -> Iterator[str]:
    """The signature, and where the results are; `counts`: parameters of each pass, without its number."""
    each = [f"X{n}_{r}" for n in range(passes) for r in range(results)]
    lses = [f"LSE{n}" for n in range(passes)] if with_lse else []
    indent = " " * (len(name) + 5)
    numbers = [f"{count}{n}" for count in counts for n in range(passes)]
    yield "@triton.jit"
    yield f"def {name}(SLOTS, {', '.join([*lses, *each])},"
    yield f"{indent}{', '.join(numbers)}, num_rows, num_blocks, {_strides('out')},"
    yield f"{indent}{', '.join(f'OUT{r}' for r in range(results))}{', LSE' if with_lse else ''},"
    yield f"{indent}{_steps('out')},"
    yield f"{indent}NUM_HEADS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):"
    yield "    block, batch, head = locate(num_blocks, NUM_HEADS)"
    yield "    pair = batch * NUM_HEADS + head"
    yield "    rows = block * BLOCK + tl.arange(0, BLOCK)"
    for n in range(passes):
        yield f"    slots{n} = slots_of(SLOTS, {n}, rows, num_rows)"


def _combine_lines(name: str, passes: int, results: int, with_lse: bool) -> Iterator[str]:
    yield from _combine_head(name, passes, results, with_lse, ["count"])
    if with_lse:
        for n in range(passes):
            yield f"    lse{n} = partial_lse(LSE{n}, pair, slots{n}, count{n})"
        yield "    top = lse0"
        for n in range(1, passes):
            yield f"    top = tl.maximum(top, lse{n})"
        yield '    top = tl.where(top != -float("inf"), top, 0.0)'
        for n in range(passes):
            yield f"    share{n} = share(lse{n}, top)"
        yield f"    total = {' + '.join(f'share{n}' for n in range(passes))}"
        yield "    safe = tl.where(total != 0.0, total, 1.0)"
    for r in range(results):
        for n in range(passes):
            weight = f" * (share{n} / safe)[:, None]" if with_lse else ""
            term = f"partial_rows(X{n}_{r}, pair, slots{n}, count{n}, HEAD_DIM, WIDTH){weight}"
            yield f"    out = {term}" if n == 0 else f"    out += {term}"
        to = f"head_of(OUT{r}, batch, head, out_b, out_h, UNIT)"
        yield f"    store_rows({to}, out, rows, num_rows, OUT_T, HEAD_DIM, WIDTH)"
    if with_lse:
        yield "    lse = merged_lse(top, total)"
        yield "    tl.store(LSE + pair.to(tl.int64) * num_rows + rows, lse, mask=rows < num_rows)"


def _merge_parts_lines(name: str, passes: int) -> Iterator[str]:
    yield from _combine_head(name, passes, 1, True, ["count", "parts"])
    yield "    top, total, acc = start(BLOCK, WIDTH)"
    for n in range(passes):
        which = f"LSE{n}, X{n}_0, pair, at, count{n}"
        yield f"    for part in tl.range(0, parts{n}, loop_unroll_factor=4):"
        yield f"        at = tl.where(slots{n} >= 0, slots{n} + part * (count{n} // parts{n}), -1)"
        yield f"        top, total, acc = resume(top, total, acc, {which}, HEAD_DIM, WIDTH)"
    yield "    out, lse = finish(top, total, acc)"
    yield "    to = head_of(OUT0, batch, head, out_b, out_h, UNIT)"
    yield "    store_rows(to, out, rows, num_rows, OUT_T, HEAD_DIM, WIDTH)"
    yield "    tl.store(LSE + pair.to(tl.int64) * num_rows + rows, lse, mask=rows < num_rows)"


def _kernel(name: str, lines: Iterator[str], facts: PassFacts, modification: Sequence[str]) -> Kernel:
    return load(name, "\n".join([*_keeps(facts), *modification, *lines]) + "\n")
