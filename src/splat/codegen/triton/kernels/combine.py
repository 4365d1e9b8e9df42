"""Merging passes: a row's partial results lie in one slot of each earlier pass that works on it."""

import triton
import triton.language as tl

from splat.codegen.triton.kernels.tiles import LEAST, LN2, LOG2E


@triton.jit
def slots_of(SLOTS, which, rows, num_rows):
    """int32 [BLOCK]: where a pass keeps these rows; -1 where it has nothing of them."""
    return tl.load(SLOTS + which * num_rows + rows, mask=rows < num_rows, other=-1)


@triton.jit
def partial_lse(LSE, pair, slots, num_slots):
    """float32 [BLOCK]: a pass's log-sum-exp of these rows; -inf where it has nothing of them."""
    return tl.load(LSE + pair.to(tl.int64) * num_slots + slots, mask=slots >= 0, other=-float("inf"))


@triton.jit
def partial_rows(X, pair, slots, num_slots, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """float32 [BLOCK, WIDTH]: a pass's result for these rows; zeros where it has nothing of them."""
    d = tl.arange(0, WIDTH)
    at = X + (pair.to(tl.int64) * num_slots + slots)[:, None] * HEAD_DIM + d[None, :]
    return tl.load(at, mask=(slots >= 0)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def share(lse, top):
    """A pass's share of the softmax's denominator, relative to the largest log-sum-exp."""
    return tl.where(lse != -float("inf"), tl.exp2((lse - top) * LOG2E), 0.0)


@triton.jit
def merged_lse(top, total):
    """Log-sum-exp of all passes; -inf where no pass has anything. NaN stays."""
    return tl.where(total != 0.0, top + tl.log2(tl.where(total != 0.0, total, 1.0)) * LN2, -float("inf"))


@triton.jit
def resume(top, total, acc, LSE, X, pair, slots, num_slots, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The online softmax's state after an earlier pass's pairs too: as if they were one more tile."""
    lse = partial_lse(LSE, pair, slots, num_slots)
    some = lse != -float("inf")
    last = tl.where(some, lse * LOG2E, LEAST)
    new_top = tl.maximum(top, last)
    decay = tl.exp2(top - new_top)
    weight = tl.where(some, tl.exp2(last - new_top), 0.0)
    partial = partial_rows(X, pair, slots, num_slots, HEAD_DIM, WIDTH)
    return new_top, total * decay + weight, acc * decay[:, None] + partial * weight[:, None]
