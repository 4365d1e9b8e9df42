"""Forward: the online softmax along one phase of a walk, and its end."""

import triton
import triton.language as tl

from splat.codegen.triton.kernels.tiles import LEAST, LN2, LOG2E, load_lattice, tanh


@triton.jit
def start(BLOCK_Q: tl.constexpr, WIDTH: tl.constexpr):
    """Largest score (times log2 e), sum of weights and weighted sum of values of rows that have seen nothing."""
    top = tl.full([BLOCK_Q], LEAST, tl.float32)
    return top, tl.zeros([BLOCK_Q], tl.float32), tl.zeros([BLOCK_Q, WIDTH], tl.float32)


@triton.jit
def attend(top, total, acc, q, K, V, begin, end, stop, bounds, scale, soft_cap, k_t, v_t, stride,
           KEEP: tl.constexpr, LIMITED: tl.constexpr, SOFT_CAP: tl.constexpr, GUARD: tl.constexpr,
           BLOCK_KV: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
           DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, rows=None, residue=None, place=None,
           MODIFY: tl.constexpr = None):  # fmt: skip
    """Attends to lattice columns [begin, end), a block at a time.

    KEEP(x, bounds) says which pairs the pattern has; None: all. LIMITED: `stop` comes from key lengths and is compared.
    GUARD: some key may be in no pair and hold anything; it must not reach a result. MODIFY(scores, rows, columns,
    place) makes other scores; None: they stay, and neither rows nor residue nor place are read.
    """
    EDGE: tl.constexpr = LIMITED or KEEP is not None
    for x in tl.range(begin, end, BLOCK_KV):
        k = load_lattice(K, x, stop, k_t, stride, BLOCK_KV, HEAD_DIM, WIDTH, EDGE, WIDE, DESCRIPTORS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_KV]
        if MODIFY is not None:
            at = residue + stride * (x + tl.arange(0, BLOCK_KV))
            s = MODIFY(s * scale, rows[:, None], at[None, :], place)
            unit = LOG2E
            if SOFT_CAP:
                s = tl.where(s == -float("inf"), s, tanh(s / soft_cap))
                unit = soft_cap * LOG2E
        elif SOFT_CAP:
            s = tanh(s * (scale / soft_cap))
            unit = soft_cap * LOG2E
        else:
            unit = scale * LOG2E
        if EDGE:
            at = x + tl.arange(0, BLOCK_KV)
            if KEEP is not None:
                keep = KEEP(at, bounds)
                s = tl.where(keep, s, -float("inf"))
            if LIMITED:
                s = tl.where((at < stop)[None, :], s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * unit)
        p = tl.exp2(s * unit - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        v = load_lattice(V, x, stop, v_t, stride, BLOCK_KV, HEAD_DIM, WIDTH, EDGE, WIDE, DESCRIPTORS)
        if GUARD and KEEP is not None:
            v = tl.where((tl.max(keep.to(tl.int32), 0) > 0)[:, None], v, 0.0).to(v.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return top, total, acc


@triton.jit
def finish(top, total, acc):
    """(output [BLOCK_Q, WIDTH], log-sum-exp [BLOCK_Q]): 0 and -inf where a row attends to nothing."""
    some = total != 0.0
    safe = tl.where(some, total, 1.0)
    return acc / safe[:, None], tl.where(some, (top + tl.log2(safe)) * LN2, -float("inf"))
