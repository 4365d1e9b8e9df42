"""R-SDDMM, R-softmax and R-SpMM on values: row-compressed [batch, rows, width], or packed [batch, non-zeros].

The value of row i at lattice column x of a component lies at `values[b, i, shift[i] + x]`, where `shift` is the
component's offset less the row's lower bound: one sum per row, whatever the pattern. Packed values, one row's after the
other's and without padding, lie at `values[b, shift[i] + x]`: only `shift` differs. PLACES says which, and what holds a
place: 32 bits ("rows", "packed") or 64 ("far rows", where a batch entry may have 2^30 values and more). `width` is how
many values a row has; packed, a batch entry.

Tables, int32, beside those of `kernels.tiles`:

    TASKS    [slots, 11]       R-SDDMM: a row tile of one component each; `FIELDS_OF_TASK` says what
    SHIFTS   [components, rows]
    SOURCES  [walks]           the component (row of SHIFTS) that a walk's values belong to
    COUNTS   [components, rows], OFFSETS [components]   R-softmax; packed, [1, rows] and where rows begin, [rows]

Rows of a tile that are not aligned visit all columns between, and have every `hop`-th of them: HOPS. Their bounds are
columns, their values lie where those of the lattice do, `column // hop`.

A phase's TEST says what a masked tile compares: "lower", "upper" or "both"; "none": every row has every column. A phase
that no tile has is "absent". R-SpMM has "rows" where a component is not regular seen from its columns.
"""

import triton
import triton.language as tl

from splat.codegen.triton.kernels.tiles import (
    LOG2E,
    bound,
    load_lattice,
    load_rows,
    locate,
    rows_by_map,
    rows_in_steps,
    span,
    store_rows,
)

#: component, stride, offset (packed: the row of BOUNDS that holds `shift`), x0, x1, x2, x3, stop, residue, and the
#: values [least, width) that some row pads.
FIELDS_OF_TASK: tl.constexpr = tl.constexpr(11)


@triton.jit
def kept(x, lower, upper, TEST: tl.constexpr):
    """bool [rows, columns]: the pairs that the pattern has, where only some bounds can cut."""
    if TEST == "lower":
        return x[None, :] >= lower[:, None]
    elif TEST == "upper":
        return x[None, :] < upper[:, None]
    else:
        return (x[None, :] >= lower[:, None]) & (x[None, :] < upper[:, None])


@triton.jit
def hopped(keep, x, lower, hop):
    """`keep`, where columns x are among the row's: those of its first one's residue."""
    return keep & ((x % hop)[None, :] == (lower % hop)[:, None])


@triton.jit
def entry_of(VALUES, entry, num_rows, width, PLACES: tl.constexpr):
    """The first value of a batch entry."""
    if PLACES == "packed":
        return VALUES + entry * width
    else:
        return VALUES + entry * num_rows * width


@triton.jit
def first_of(rows, width, shift, PLACES: tl.constexpr):
    """Where `rows` would have their lattice column 0, in elements past a batch entry's first value."""
    if PLACES == "packed":
        return shift
    elif PLACES == "far rows":
        return rows.to(tl.int64) * width + shift
    else:
        return rows * width + shift


# -- R-SDDMM -----------------------------------------------------------------------------------------------------------


@triton.jit
def products(q, K, VALUES, at, inside, begin, end, stop, lower, upper, stride, hop, HOPS: tl.constexpr,
             TEST: tl.constexpr, RAGGED: tl.constexpr, BLOCK_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
             WIDTH: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Writes the products of the rows `q` and lattice columns [begin, end); that of row i and x is value at[i] + x."""
    EDGE: tl.constexpr = TEST != "none"
    for x in tl.range(begin, end, BLOCK_KV):
        k = load_lattice(K, x, stop, HEAD_DIM, stride, BLOCK_KV, HEAD_DIM, WIDTH, EDGE, WIDE, False)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_KV]
        n = x + tl.arange(0, BLOCK_KV)
        if HOPS:
            target = VALUES + (at[:, None] + (n // hop)[None, :])
        else:
            target = VALUES + (at[:, None] + n[None, :])
        if EDGE:
            keep = kept(n, lower, upper, TEST)
            if HOPS:
                keep = hopped(keep, n, lower, hop)
            tl.store(target, s, mask=keep)
        elif RAGGED:
            tl.store(target, s, mask=inside[:, None])
        else:
            tl.store(target, s)


@triton.jit
def splat_sddmm(Q, K, TASKS, ROWS, BOUNDS, num_slots, num_rows, num_cols, width, VALUES,
                STRIDE: tl.constexpr, HOPS: tl.constexpr, LEFT: tl.constexpr, FULL: tl.constexpr, RIGHT: tl.constexpr,
                PADDED: tl.constexpr, RAGGED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
                HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, PLACES: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """VALUES = Q K^T for the pairs of the pattern, 0 in padding. A program has a row tile of one component.

    STRIDE: of all components; 0: each task says its own. PADDED: some row has less values than its component is wide.
    RAGGED: some tile has less rows than BLOCK_Q.
    """
    slot, batch, _ = locate(num_slots, 1)
    task = TASKS + slot * FIELDS_OF_TASK
    component = tl.load(task)
    if STRIDE:
        hop = STRIDE
    else:
        hop = tl.load(task + 1)
    if HOPS:
        stride = 1
    else:
        stride = hop
    rows = rows_by_map(ROWS, slot, BLOCK_Q)
    inside = rows < num_rows
    lower = bound(BOUNDS, 2 * component, rows, num_rows)
    upper = bound(BOUNDS, 2 * component + 1, rows, num_rows)
    entry = batch.to(tl.int64)
    values = entry_of(VALUES, entry, num_rows, width, PLACES)
    if PLACES == "packed":
        at = tl.load(BOUNDS + tl.load(task + 2) * num_rows + rows, mask=inside, other=0)
    else:
        first = first_of(rows, width, tl.load(task + 2), PLACES)  # of the component's values
        if HOPS:
            at = first - lower // hop
        else:
            at = first - lower
    stop = tl.load(task + 7)
    k_of = K + entry * num_cols * HEAD_DIM + tl.load(task + 8).to(tl.int64) * HEAD_DIM
    q = load_rows(Q + entry * num_rows * HEAD_DIM, rows, num_rows, HEAD_DIM, HEAD_DIM, WIDTH)
    x0, x1, x2, x3 = tl.load(task + 3), tl.load(task + 4), tl.load(task + 5), tl.load(task + 6)
    if LEFT != "absent":
        products(q, k_of, values, at, inside, x0, x1, stop, lower, upper, stride, hop, HOPS, LEFT, RAGGED,
                 BLOCK_KV, HEAD_DIM, WIDTH, WIDE, PRECISION)  # fmt: skip
    if FULL:
        products(q, k_of, values, at, inside, x1, x2, stop, lower, upper, stride, hop, HOPS, "none", RAGGED,
                 BLOCK_KV, HEAD_DIM, WIDTH, WIDE, PRECISION)  # fmt: skip
    if RIGHT != "absent":
        products(q, k_of, values, at, inside, x2, x3, stop, lower, upper, stride, hop, HOPS, RIGHT, RAGGED,
                 BLOCK_KV, HEAD_DIM, WIDTH, WIDE, PRECISION)  # fmt: skip
    if PADDED:
        end = tl.load(task + 10)
        for t in tl.range(tl.load(task + 9), end, BLOCK_KV):
            n = t + tl.arange(0, BLOCK_KV)
            if HOPS:
                count = (upper - lower + hop - 1) // hop
            else:
                count = upper - lower
            padding = inside[:, None] & (n[None, :] >= count[:, None]) & (n < end)[None, :]
            tl.store(values + (first[:, None] + n[None, :]), tl.zeros([BLOCK_Q, BLOCK_KV], tl.float32), mask=padding)


# -- R-softmax ---------------------------------------------------------------------------------------------------------


@triton.jit
def has_value(COUNTS, OFFSETS, n, rows, num_rows, COMPONENTS: tl.constexpr):
    """bool [rows, n]: which values are not padding."""
    inside = rows < num_rows
    if COMPONENTS == 1:
        keep = n[None, :] < tl.load(COUNTS + rows, mask=inside, other=0)[:, None]
    else:
        keep = (n < 0)[None, :] & (rows < 0)[:, None]
        for c in range(COMPONENTS):
            t = n - tl.load(OFFSETS + c)
            count = tl.load(COUNTS + c * num_rows + rows, mask=inside, other=0)
            keep = keep | ((t >= 0)[None, :] & (t[None, :] < count[:, None]))
    return keep


@triton.jit
def splat_softmax(VALUES, COUNTS, OFFSETS, num_blocks, num_rows, width, size, OUT,
                  COMPONENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
                  PLACES: tl.constexpr):  # fmt: skip
    """OUT = each row's exponentials over their sum, 0 in padding and in rows without a value.

    WHOLE: a row fits into a block and is read once. Otherwise it is read twice, a block at a time: for its largest
    value and the sum relative to that, which grow together, and for the results. `width`: of the longest row; `size`:
    of a batch entry.
    """
    block, batch, _ = locate(num_blocks, 1)
    rows = block * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None]
    if PLACES == "packed":
        at = batch.to(tl.int64) * size + tl.load(OFFSETS + rows, mask=rows < num_rows, other=0)
    else:
        at = batch.to(tl.int64) * num_rows * width + rows.to(tl.int64) * width
    if WHOLE:
        keep = has_value(COUNTS, OFFSETS, lane, rows, num_rows, COMPONENTS)
        x = tl.load(VALUES + at[:, None] + lane[None, :], mask=keep, other=-float("inf"))
        top = tl.max(x, 1)
        top = tl.where(top == -float("inf"), 0.0, top)
        e = tl.exp2((x - top[:, None]) * LOG2E)
        total = tl.sum(e, 1)
        e = e / tl.where(total == 0.0, 1.0, total)[:, None]
        if PLACES == "packed":
            tl.store(OUT + at[:, None] + lane[None, :], e, mask=keep)
        else:
            tl.store(OUT + at[:, None] + lane[None, :], e, mask=inside & (lane < width)[None, :])
    else:
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in tl.range(0, width, BLOCK):
            n = start + lane
            keep = has_value(COUNTS, OFFSETS, n, rows, num_rows, COMPONENTS)
            x = tl.load(VALUES + at[:, None] + n[None, :], mask=keep, other=-float("inf"))
            new_top = tl.maximum(top, tl.max(x, 1))
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((x - base[:, None]) * LOG2E), 1)
            top = new_top
        top = tl.where(top == -float("inf"), 0.0, top)
        total = tl.where(total == 0.0, 1.0, total)
        for start in tl.range(0, width, BLOCK):
            n = start + lane
            keep = has_value(COUNTS, OFFSETS, n, rows, num_rows, COMPONENTS)
            x = tl.load(VALUES + at[:, None] + n[None, :], mask=keep, other=-float("inf"))
            e = tl.exp2((x - top[:, None]) * LOG2E) / total[:, None]
            if PLACES == "packed":
                tl.store(OUT + at[:, None] + n[None, :], e, mask=keep)
            else:
                tl.store(OUT + at[:, None] + n[None, :], e, mask=inside & (n < width)[None, :])


# -- R-SpMM ------------------------------------------------------------------------------------------------------------


@triton.jit
def unknown_zeros(length, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """float32 [ROWS, WIDTH] zeros of which the compiler does not know that they are, for `backward.zeros`'s reason."""
    n = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return n.to(tl.float32) * (length < 0)


@triton.jit
def add_products(acc, VALUES, SHIFT, X, at, columns, inside, begin, end, stop, residue, lower, upper, width,
                 TEST: tl.constexpr, STRIDE: tl.constexpr, HOP: tl.constexpr, TRANSPOSED: tl.constexpr,
                 GUARD: tl.constexpr, RAGGED: tl.constexpr, BLOCK_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
                 WIDTH: tl.constexpr, WIDE: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds values times lattice rows [begin, end) of X.

    That of row i at x is value `at[i] + x`. TRANSPOSED: the lattice is one of matrix rows, and so are the values; that
    of column j lies `columns[j]` past its row's first. GUARD: some row of X may be in no pair and hold anything.
    """
    EDGE: tl.constexpr = TEST != "none"
    for x in tl.range(begin, end, BLOCK_KV):
        n = x + tl.arange(0, BLOCK_KV)
        if TRANSPOSED:
            row = residue + STRIDE * n
            shift = tl.load(SHIFT + row, mask=n < stop, other=0)
            source = VALUES + (first_of(row, width, shift, PLACES)[None, :] + columns[:, None])
        elif HOP > 1:
            source = VALUES + (at[:, None] + (n // HOP)[None, :])
        else:
            source = VALUES + (at[:, None] + n[None, :])
        if EDGE:
            keep = kept(n, lower, upper, TEST)
            if HOP > 1:
                keep = hopped(keep, n, lower, HOP)
            p = tl.load(source, mask=keep, other=0.0)  # [BLOCK_Q, BLOCK_KV]
        elif RAGGED:
            p = tl.load(source, mask=inside[:, None], other=0.0)
        else:
            p = tl.load(source)
        v = load_lattice(X, x, stop, HEAD_DIM, STRIDE, BLOCK_KV, HEAD_DIM, WIDTH, EDGE, WIDE, False)
        if EDGE and GUARD:
            v = tl.where((tl.max(keep.to(tl.int32), 0) > 0)[:, None], v, 0.0).to(v.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_bound(TABLE, which, rows, num_rows):
    """int32 [rows]: one row of a table; 0 past the end, which is no pair's."""
    return tl.load(TABLE + which * num_rows + rows, mask=rows < num_rows, other=0)


@triton.jit
def add_products_by_row(acc, VALUES, SHIFT, BOUNDS, X, walk, columns, residues, inside, begin, end, num_rows, width,
                        VALUE_STRIDE: tl.constexpr, BLOCK_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
                        WIDTH: tl.constexpr, WIDE: tl.constexpr, PLACES: tl.constexpr,
                        PRECISION: tl.constexpr):  # fmt: skip
    """Transposed `add_products` of rows [begin, end), where columns are not regular: it looks at each row's bounds."""
    for x in tl.range(begin, end, BLOCK_KV):
        row = x + tl.arange(0, BLOCK_KV)
        lower = load_bound(BOUNDS, 3 * walk, row, num_rows)
        upper = load_bound(BOUNDS, 3 * walk + 1, row, num_rows)
        keep = (columns[:, None] >= lower[None, :]) & (columns[:, None] < upper[None, :]) & inside[:, None]
        if VALUE_STRIDE > 1:
            keep = keep & (residues[:, None] == load_bound(BOUNDS, 3 * walk + 2, row, num_rows)[None, :])
        shift = load_bound(SHIFT, walk, row, num_rows)
        source = VALUES + (first_of(row, width, shift, PLACES)[None, :] + columns[:, None])
        p = tl.load(source, mask=keep, other=0.0)  # [BLOCK_Q, BLOCK_KV]
        v = load_lattice(X, x, end, HEAD_DIM, 1, BLOCK_KV, HEAD_DIM, WIDTH, True, WIDE, False)
        v = tl.where((tl.max(keep.to(tl.int32), 0) > 0)[:, None], v, 0.0).to(v.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_walk(acc, VALUES, X, TILES, BOUNDS, SHIFTS, SOURCES, walk, slot, rows, columns, num_out, num_values, width,
             WALKS: tl.constexpr, LEFT: tl.constexpr, FULL: tl.constexpr, RIGHT: tl.constexpr, STRIDE: tl.constexpr,
             HOP: tl.constexpr, TRANSPOSED: tl.constexpr, GUARD: tl.constexpr, RAGGED: tl.constexpr,
             BLOCK_KV: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
             PLACES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds what lies along one walk."""
    x0, x1, x2, x3, stop, residue = span(TILES, slot, walk, WALKS)
    lower = bound(BOUNDS, 2 * walk, rows, num_out)
    upper = bound(BOUNDS, 2 * walk + 1, rows, num_out)
    inside = rows < num_out
    shifts = SHIFTS + tl.load(SOURCES + walk) * num_values
    if TRANSPOSED:
        at = rows
    else:
        at = first_of(rows, width, tl.load(shifts + rows, mask=inside, other=0), PLACES)
    lattice = X + residue.to(tl.int64) * HEAD_DIM
    if LEFT != "absent":
        acc = add_products(acc, VALUES, shifts, lattice, at, columns, inside, x0, x1, stop, residue, lower, upper,
                           width, LEFT, STRIDE, HOP, TRANSPOSED, GUARD, RAGGED, BLOCK_KV, HEAD_DIM, WIDTH, WIDE,
                           PLACES, PRECISION)  # fmt: skip
    if FULL:
        acc = add_products(acc, VALUES, shifts, lattice, at, columns, inside, x1, x2, stop, residue, lower, upper,
                           width, "none", STRIDE, HOP, TRANSPOSED, GUARD, RAGGED, BLOCK_KV, HEAD_DIM, WIDTH, WIDE,
                           PLACES, PRECISION)  # fmt: skip
    if RIGHT != "absent":
        acc = add_products(acc, VALUES, shifts, lattice, at, columns, inside, x2, x3, stop, residue, lower, upper,
                           width, RIGHT, STRIDE, HOP, TRANSPOSED, GUARD, RAGGED, BLOCK_KV, HEAD_DIM, WIDTH, WIDE,
                           PLACES, PRECISION)  # fmt: skip
    return acc


@triton.jit
def splat_spmm(VALUES, X, EARLIER, TILES, ROWS, BOUNDS, SHIFTS, SOURCES, num_slots, num_out, num_in, width, OUT,
               STEP: tl.constexpr, STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr,
               WALKS: tl.constexpr, UNROLL: tl.constexpr, LEFT: tl.constexpr, FULL: tl.constexpr, RIGHT: tl.constexpr,
               RESUME: tl.constexpr, GUARD: tl.constexpr, RAGGED: tl.constexpr, TILE_ROWS: tl.constexpr,
               BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
               WIDE: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """OUT = P X, or P^T X, where P has these values; RESUME: added to EARLIER, of other components.

    A program has a tile of OUT's rows, which are columns of the matrix where TRANSPOSED; those lie VALUE_STRIDE apart
    in the lattice of the values. Not TRANSPOSED, a larger VALUE_STRIDE than STRIDE says that rows are not aligned.
    """
    HOP: tl.constexpr = 1 if TRANSPOSED else VALUE_STRIDE // STRIDE
    slot, batch, _ = locate(num_slots, 1)
    entry = batch.to(tl.int64)
    if STEP:
        rows = rows_in_steps(TILES, slot, num_out, WALKS, STEP, TILE_ROWS, BLOCK_Q)
        # Said again in a form from which the compiler sees that columns follow one another in memory.
        first = tl.load(TILES + slot * (1 + 6 * WALKS)) // VALUE_STRIDE
        columns = first + STEP // VALUE_STRIDE * tl.arange(0, BLOCK_Q)
    else:
        rows = rows_by_map(ROWS, slot, BLOCK_Q)
        columns = rows // VALUE_STRIDE
    if TRANSPOSED:
        num_values = num_in
    else:
        num_values = num_out
    values = entry_of(VALUES, entry, num_values, width, PLACES)
    x = X + entry * num_in * HEAD_DIM
    if RESUME:
        acc = load_rows(EARLIER + entry * num_out * HEAD_DIM, rows, num_out, HEAD_DIM, HEAD_DIM, WIDTH)
    else:
        acc = unknown_zeros(num_out, BLOCK_Q, WIDTH)
    if LEFT == "rows":
        for walk in tl.range(WALKS):
            x0, x1, _, _, _, _ = span(TILES, slot, walk, WALKS)
            acc = add_products_by_row(acc, values, SHIFTS, BOUNDS, x, walk, columns, rows % VALUE_STRIDE,
                                      rows < num_out, x0, x1, num_in, width, VALUE_STRIDE, BLOCK_KV, HEAD_DIM, WIDTH,
                                      WIDE, PLACES, PRECISION)  # fmt: skip
    elif UNROLL:
        for walk in tl.static_range(WALKS):
            acc = add_walk(acc, values, x, TILES, BOUNDS, SHIFTS, SOURCES, walk, slot, rows, columns, num_out,
                           num_values, width, WALKS, LEFT, FULL, RIGHT, STRIDE, HOP, TRANSPOSED, GUARD, RAGGED,
                           BLOCK_KV, HEAD_DIM, WIDTH, WIDE, PLACES, PRECISION)  # fmt: skip
    else:
        for walk in tl.range(WALKS):
            acc = add_walk(acc, values, x, TILES, BOUNDS, SHIFTS, SOURCES, walk, slot, rows, columns, num_out,
                           num_values, width, WALKS, LEFT, FULL, RIGHT, STRIDE, HOP, TRANSPOSED, GUARD, RAGGED,
                           BLOCK_KV, HEAD_DIM, WIDTH, WIDE, PLACES, PRECISION)  # fmt: skip
    store_rows(OUT + entry * num_out * HEAD_DIM, acc, rows, num_out, HEAD_DIM, HEAD_DIM, WIDTH)
