"""What all kernels share: where a program works, how it reads rows and lattices, and how scores are made.

Words: a program works on one row tile of one head. Its rows lie in registers or shared memory; its loops run over
lattice columns `residue + stride * x`, a block of consecutive x at a time.

Tables, int32, made by `splat.codegen.triton.tables`:

    TILES   [slots, 1 + 6*walks]   first row; then for every walk x0, x1, x2, x3, stop, residue:
                                   [x0, x1) left edge, [x1, x2) full, [x2, x3) right edge; nothing is
                                   read from `stop` on
    ROWS    [slots, BLOCK_Q]       the rows of a tile where they are not `first + step * n`; num_rows where padded
    BOUNDS  [tests, 2, num_rows]   lower and upper lattice bound of every row in a component
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
#: Above every bound: no column is at or past it. `splat.acsr.NOWHERE`.
NOWHERE: tl.constexpr = tl.constexpr(2**30)
#: Fields of a walk in TILES.
FIELDS: tl.constexpr = tl.constexpr(6)
#: Less than every score, yet finite, so that exp2(-inf - LEAST) is 0 and not NaN.
LEAST: tl.constexpr = tl.constexpr(-1.0e38)


@triton.jit
def locate(num_slots, NUM_HEADS: tl.constexpr):
    """(slot, batch, head) of this program; the tiles of one head are neighbours, because they share K and V in L2."""
    program = tl.program_id(0)
    slot = program % num_slots
    pair = program // num_slots
    return slot, pair // NUM_HEADS, pair % NUM_HEADS


@triton.jit
def head_of(X, batch, head, stride_b, stride_h, UNIT: tl.constexpr):
    """The first element of one head of an array; strides are in UNIT elements, so that its alignment is known."""
    return X + (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h) * UNIT


@triton.jit
def rows_in_steps(TILES, slot, num_rows, WALKS: tl.constexpr, STEP: tl.constexpr, TILE_ROWS: tl.constexpr,
                  BLOCK_Q: tl.constexpr):  # fmt: skip
    """int32 [BLOCK_Q]: the tile's rows; num_rows where padded."""
    n = tl.arange(0, BLOCK_Q)
    row = tl.load(TILES + slot * (1 + FIELDS * WALKS)) + STEP * n
    return tl.where((n < TILE_ROWS) & (row < num_rows), row, num_rows)


@triton.jit
def rows_by_map(ROWS, slot, BLOCK_Q: tl.constexpr):
    """int32 [BLOCK_Q]: the tile's rows; num_rows where padded."""
    return tl.load(ROWS + slot * BLOCK_Q + tl.arange(0, BLOCK_Q))


@triton.jit
def span(TILES, slot, walk, WALKS: tl.constexpr):
    """x0, x1, x2, x3, stop, residue of a walk."""
    at = TILES + slot * (1 + FIELDS * WALKS) + 1 + FIELDS * walk
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def cut(x1, x2, stop, residue, length, stride, BLOCK: tl.constexpr):
    """Where key lengths end the full tiles, and what lies past them: (end of the full tiles, stop)."""
    stop = tl.minimum(stop, (length - residue + stride - 1) // stride)
    inside = tl.maximum(tl.minimum(x2, stop) - x1, 0)
    return x1 + inside // BLOCK * BLOCK, stop


@triton.jit
def skip(live, x0, x1, x2, x3):
    """The phases, all empty unless `live`."""
    on = live.to(tl.int32)
    return x0 * on, x1 * on, x2 * on, x3 * on


@triton.jit
def bound(BOUNDS, which, rows, num_rows):
    """int32 [BLOCK_Q]: lower (even `which`) or upper (odd) bounds of the rows; padded rows keep nothing."""
    side = which % 2
    return tl.load(BOUNDS + which * num_rows + rows, mask=rows < num_rows, other=NOWHERE * (1 - 2 * side))


@triton.jit
def load_rows(X, rows, num_rows, stride_row, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[BLOCK_Q, WIDTH]: rows of an array; zeros where padded."""
    d = tl.arange(0, WIDTH)
    at = X + rows.to(tl.int64)[:, None] * stride_row + d[None, :]
    if WIDTH == HEAD_DIM:
        return tl.load(at, mask=(rows < num_rows)[:, None], other=0.0)
    else:
        return tl.load(at, mask=(rows < num_rows)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(X, values, rows, num_rows, stride_row, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Writes [BLOCK_Q, WIDTH] to the rows that are not padded."""
    d = tl.arange(0, WIDTH)
    at = X + rows.to(tl.int64)[:, None] * stride_row + d[None, :]
    if WIDTH == HEAD_DIM:
        tl.store(at, values.to(X.dtype.element_ty), mask=(rows < num_rows)[:, None])
    else:
        tl.store(at, values.to(X.dtype.element_ty), mask=(rows < num_rows)[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def lattice(X, residue, stop, stride_row, stride, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
            DESCRIPTORS: tl.constexpr):  # fmt: skip
    """The lattice columns `residue + stride * x` of an array, to be read by `load_lattice`."""
    base = X + residue.to(tl.int64) * stride_row
    if DESCRIPTORS:  # what lies outside [0, stop) is read as zero
        shape = [tl.maximum(stop, 1), HEAD_DIM]
        return tl.make_tensor_descriptor(base, shape, [tl.cast(stride, tl.int64) * stride_row, 1], [BLOCK, WIDTH])
    else:
        return base


@triton.jit
def load_lattice(X, x, stop, stride_row, stride, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
                 EDGE: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr):  # fmt: skip
    """[BLOCK, WIDTH]: lattice columns x + [0, BLOCK); at an EDGE zeros from `stop` on, elsewhere all are inside."""
    if DESCRIPTORS:
        return X.load([x, 0])
    else:
        n = tl.arange(0, BLOCK)
        d = tl.arange(0, WIDTH)
        if WIDE:
            step = tl.cast(stride, tl.int64) * stride_row
            offset = n.to(tl.int64) * step
        else:
            step = stride * stride_row
            offset = n * step
        at = X + tl.cast(x, tl.int64) * step + offset[:, None] + d[None, :]
        if EDGE and WIDTH != HEAD_DIM:
            return tl.load(at, mask=(x + n < stop)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        elif EDGE:
            return tl.load(at, mask=(x + n < stop)[:, None], other=0.0)
        elif WIDTH != HEAD_DIM:
            return tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0.0)
        else:
            return tl.load(at)


@triton.jit
def tanh(y):
    e = tl.exp2(tl.abs(y) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(y < 0, -t, t)
