"""Backward: dQ along the forward's walks, dK and dV along the transposed ones. Nothing is added atomically."""

import triton
import triton.language as tl

from splat.codegen.triton.kernels.tiles import LOG2E, head_of, load_lattice, load_rows, tanh


@triton.jit
def weights(s, lse2, scale, soft_cap, SOFT_CAP: tl.constexpr):
    """(p, d score / d (scaled q.k)): softmax weights from raw scores; `lse2` is log-sum-exp * log2 e, broadcast.

    No weight exceeds 1: of scores in the millions a rounding is more than 1.
    """
    if SOFT_CAP:
        t = tanh(s * (scale / soft_cap))
        exponent = t * (soft_cap * LOG2E) - lse2
        slope = 1.0 - t * t
    else:
        exponent = s * (scale * LOG2E) - lse2
        slope = 1.0
    return tl.exp2(tl.where(exponent > 0.0, 0.0, exponent)), slope


@triton.jit
def modified_weights(s, lse2, row, column, place, soft_cap, MODIFY: tl.constexpr, SOFT_CAP: tl.constexpr):
    """The same of scores that MODIFY(scores, row, column, place) makes others of, and their derivatives by the old."""
    s, slope = MODIFY(s, row, column, place)
    hidden = s == -float("inf")
    if SOFT_CAP:
        t = tanh(s / soft_cap)
        s = soft_cap * t
        slope = slope * (1.0 - t * t)
    exponent = s * LOG2E - lse2
    p = tl.exp2(tl.where(exponent > 0.0, 0.0, exponent))
    return tl.where(hidden, 0.0, p), tl.where(hidden, 0.0, slope)


@triton.jit
def d_query(acc, q, d_out, lse2, delta, K, V, begin, end, stop, bounds, scale, soft_cap, k_t, v_t, stride,
            KEEP: tl.constexpr, LIMITED: tl.constexpr, SOFT_CAP: tl.constexpr, GUARD: tl.constexpr,
            BLOCK_KV: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
            DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, rows=None, residue=None, place=None,
            MODIFY: tl.constexpr = None):  # fmt: skip
    """Adds dQ / scale of lattice columns [begin, end) to `acc`; arguments as `forward.attend`."""
    EDGE: tl.constexpr = LIMITED or KEEP is not None
    for x in tl.range(begin, end, BLOCK_KV):
        k = load_lattice(K, x, stop, k_t, stride, BLOCK_KV, HEAD_DIM, WIDTH, EDGE, WIDE, DESCRIPTORS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MODIFY is not None:
            at = residue + stride * (x + tl.arange(0, BLOCK_KV))
            p, slope = modified_weights(
                s * scale, lse2[:, None], rows[:, None], at[None, :], place, soft_cap, MODIFY, SOFT_CAP
            )
        else:
            p, slope = weights(s, lse2[:, None], scale, soft_cap, SOFT_CAP)
        v = load_lattice(V, x, stop, v_t, stride, BLOCK_KV, HEAD_DIM, WIDTH, EDGE, WIDE, DESCRIPTORS)
        d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        d_s = p * (d_p - delta[:, None]) * slope
        if EDGE:
            at = x + tl.arange(0, BLOCK_KV)
            if KEEP is not None:
                keep = KEEP(at, bounds)
                d_s = tl.where(keep, d_s, 0.0)
            if LIMITED:
                d_s = tl.where((at < stop)[None, :], d_s, 0.0)
        if GUARD and KEEP is not None:
            k = tl.where((tl.max(keep.to(tl.int32), 0) > 0)[:, None], k, 0.0).to(k.dtype)
        acc = tl.dot(d_s.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def zeros(scale, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """float32 [ROWS, WIDTH] zeros of which the compiler does not know that they are: for several loops in a row.

    Accumulators that start as a constant are set anew where the first loop is passed over, while wgmma may still be
    writing them as far as ptxas can see; it then waits after every wgmma (C7515).
    """
    n = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return n.to(tl.float32) * (scale * 0.0)


@triton.jit
def d_key_value(d_k, d_v, k, v, Q, DO, LSE, DELTA, begin, end, stop, residue, bounds, scale, soft_cap, q_t, do_t,
                stride, KEEP: tl.constexpr, SOFT_CAP: tl.constexpr, GUARD: tl.constexpr, BLOCK_KV: tl.constexpr,
                HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr,
                PRECISION: tl.constexpr, rows=None, place=None, MODIFY: tl.constexpr = None):  # fmt: skip
    """Adds dK / scale and dV of query positions `residue + stride * [begin, end)`; rows are key positions.

    GUARD: some query or key may be in no pair and hold anything; it must not reach a result.
    """
    EDGE: tl.constexpr = KEEP is not None
    for x in tl.range(begin, end, BLOCK_KV):
        at = x + tl.arange(0, BLOCK_KV)
        row = residue + stride * at
        q = load_lattice(Q, x, stop, q_t, stride, BLOCK_KV, HEAD_DIM, WIDTH, EDGE, WIDE, DESCRIPTORS)
        d_out = load_lattice(DO, x, stop, do_t, stride, BLOCK_KV, HEAD_DIM, WIDTH, EDGE, WIDE, DESCRIPTORS)
        if EDGE:
            lse = tl.load(LSE + row, mask=at < stop, other=0.0)
            delta = tl.load(DELTA + row, mask=at < stop, other=0.0)
        else:
            lse = tl.load(LSE + row)
            delta = tl.load(DELTA + row)
        if EDGE and GUARD:
            some = (lse > -float("inf"))[:, None]
            q = tl.where(some, q, 0.0).to(k.dtype)
            d_out = tl.where(some, d_out, 0.0).to(k.dtype)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_Q key rows, BLOCK_KV queries]
        if MODIFY is not None:
            p, slope = modified_weights(
                s * scale, (lse * LOG2E)[None, :], row[None, :], rows[:, None], place, soft_cap, MODIFY, SOFT_CAP
            )
        else:
            p, slope = weights(s, (lse * LOG2E)[None, :], scale, soft_cap, SOFT_CAP)
        if EDGE:
            keep = KEEP(at, bounds)
            p = tl.where(keep, p, 0.0)
        d_v = tl.dot(p.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
        d_p = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        d_s = p * (d_p - delta[None, :]) * slope
        if EDGE and (GUARD or MODIFY is not None):
            d_s = tl.where(keep, d_s, 0.0)
        d_k = tl.dot(d_s.to(q.dtype), q, d_k, input_precision=PRECISION)
    return d_k, d_v


@triton.jit
def splat_delta(OUT, DO, DLSE, out_b, out_h, do_b, do_h, num_rows, num_blocks, DELTA,
                OUT_T: tl.constexpr, DO_T: tl.constexpr, UNIT: tl.constexpr, NUM_HEADS: tl.constexpr,
                HAS_DLSE: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """delta = rowsum(dO * O) - d log-sum-exp, float32 [B, N, num_rows]: what every score's gradient subtracts."""
    program = tl.program_id(0)
    pair = program // num_blocks
    batch, head = pair // NUM_HEADS, pair % NUM_HEADS
    rows = program % num_blocks * BLOCK + tl.arange(0, BLOCK)
    o = load_rows(head_of(OUT, batch, head, out_b, out_h, UNIT), rows, num_rows, OUT_T, HEAD_DIM, WIDTH)
    d_out = load_rows(head_of(DO, batch, head, do_b, do_h, UNIT), rows, num_rows, DO_T, HEAD_DIM, WIDTH)
    delta = tl.sum(o.to(tl.float32) * d_out.to(tl.float32), 1)
    at = pair.to(tl.int64) * num_rows + rows
    if HAS_DLSE:
        delta -= tl.load(DLSE + at, mask=rows < num_rows, other=0.0)
    tl.store(DELTA + at, delta, mask=rows < num_rows)
