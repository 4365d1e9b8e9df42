// Operations on values of a sparse matrix: R-SDDMM, R-softmax, R-SpMM and its transpose, component after component.
//
// A component's rows come in groups that share a lattice of columns; a unit of work is some rows of a group. It goes
// over its span of the lattice in blocks, and each six rows take of a block what they have:
//
//     lattice x        | block ............ | block ............ |
//     rows 0 ... 5     |      [============ | =====]              |     6 x 4 vectors of registers
//     rows 6 ... 11    |        [========== | =======]            |
//
//     sddmm              C[row][x]  =  sum_d    A[row][d] * B[x][d]        x in the lanes
//     spmm               Y[row][d] +=  sum_x    P[row][x] * B[x][d]        d in the lanes
//     spmm_transposed    Y[x][d]   +=  sum_row  P[row][x] * A[row][d]      d in the lanes, six columns at a time
//
// A and B are contiguous [batch, positions, head_dim], values [batch, size] in the compute type: tables say where each
// row's lie, one after the other, so that kernels know no pattern and no layout. One serves all matrices.
#pragma once
#include "splat/run.hpp"

namespace splat {

/// Fewer columns than these are not worth a call of their own.
constexpr int kShortest = 16;

/// One component: value number t of a row is at column start + stride * hop * t, where x = start / stride + hop * t.
struct Component {
  const int32_t *start, *count;    // [rows]
  const int32_t *order, *offsets;  // rows of group g: order[offsets[g] ... offsets[g + 1])
  const int32_t *place;            // [rows]: where a row's first value is
  const int32_t *before, *after;   // [rows]: how many numbers before and after a row's values are padding
  int64_t groups, stride, hop;
};

/// Makes the padding around a row's values 0.
template <class T> SPLAT_INLINE void pad(const Component& c, int64_t row, T* values) {
  T* const own = values + c.place[row];
  for (int32_t n = 1; n <= c.before[row]; ++n) own[-n] = 0;
  memset(own + c.count[row], 0, c.after[row] * sizeof(T));
}

/// What tiles are left out, and where they begin. All are set but for comparison.
struct Savings {
  bool spans;   // only columns between a unit's first and last are visited
  bool anchors; // blocks begin where the unit's columns do, and rows compute what they have of them; else whole blocks
};

struct ValuesCall {
  int64_t batch, rows, columns, size;
  const void *left, *right;  // dense operands; `left` has a row for each row, `right` for each column
  const void* values;        // of spmm, spmm_transposed, softmax
  void* result;
  const Component* components;
  int64_t num_components;
  Savings savings;
};

/// The first operand of a product, [r][k], each row where it is.
template <class T, int R> struct InPlace {
  const T* row[R];
  SPLAT_INLINE T operator()(int r, int k) const { return row[r][k]; }
};

template <class Facts> struct Values {
  using Scalar = typename Facts::Scalar;
  using Result = typename Facts::Result;  // of products: the compute type where later components add to it
  using T = Compute<Scalar>;
  static constexpr int D = Facts::head_dim, W = kWidth<T>, Dp = (D + W - 1) / W * W, NV = kMaxVectors;
  static constexpr int R = kRows<NV>;     // rows at once
  static constexpr int kUnit = 32 * R;    // rows of a unit
  static constexpr int kBlock = 384;      // lattice columns of a block that are brought together
  static constexpr int kWide = 64;        // of a block of R-SDDMM: they lie in the lanes
  static constexpr int kInPlace = within(kBlock, (512 << 10) / (Dp * (int)sizeof(T)), 2048);  // of one that is not
  static constexpr int kChunk = 96;       // rows that the transposed product takes at once
  static constexpr int kColumns = 16 * R; // lattice columns of a unit of the transposed product

  static constexpr int most(int a, int b) { return a > b ? a : b; }

  /// Rows that share a lattice, and what they have of it.
  struct Rows {
    int num_rows, low, high;  // of the columns that some row has
    bool dense;               // all of [low, high) are columns that some row has; false: perhaps not
    int64_t residue;
    int32_t row[kUnit], lower[kUnit], upper[kUnit], place[kUnit];

    void clear() { num_rows = 0, low = 1 << 30, high = -(1 << 30), dense = true, residue = 0; }
    void find(const Component& c, int64_t from, int64_t to) {
      clear();
      for (int64_t n = from; n < to; ++n) add(c, c.order[n]);
    }
    void add(const Component& c, int32_t at) {
      const int32_t start = c.start[at], count = c.count[at];
      const int32_t x = c.stride == 1 ? start : start / (int32_t)c.stride;
      const int32_t first = count > 0 ? x : 1 << 30;
      const int32_t last = count > 0 ? x + (int32_t)c.hop * (count - 1) + 1 : -(1 << 30);
      if (count > 0) residue = start - x * c.stride;
      if (count > 0 && low < high) dense &= first <= high && last >= low;
      if (first < low) low = first;
      if (last > high) high = last;
      row[num_rows] = at, lower[num_rows] = first, upper[num_rows] = last, place[num_rows++] = c.place[at];
    }
  };
  struct Scratch {
    Rows rows;
    alignas(64) T a[most(kUnit * D, most(kChunk * kColumns, R * kInPlace))];
    alignas(64) T b[most(D * kWide, most(kBlock, kChunk) * Dp)];
    alignas(64) T c[most(R * kWide, most(kUnit, kColumns) * Dp)];
  };

  const ValuesCall& call;
  const Component& component;
  Scratch& memory;
  const bool first;  // of the components: what is in the result does not count

  // -- units ---------------------------------------------------------------------------------------------------------

  /// Runs body(values, batch, first row, end in `order`) for every unit of rows.
  template <class Body> static void for_rows(const ValuesCall& call, Pool& pool, Body&& body) {
    for (int64_t n = 0; n < call.num_components; ++n) {
      const Component& c = call.components[n];
      int64_t units = 0;
      for (int64_t g = 0; g < c.groups; ++g) units += ceil_div(c.offsets[g + 1] - c.offsets[g], kUnit);
      auto* begins = (int32_t(*)[2])malloc((units + 1) * sizeof(int32_t[2]));
      if (!begins) abort();
      int64_t unit = 0;
      for (int64_t g = 0; g < c.groups; ++g)
        for (int32_t at = c.offsets[g]; at < c.offsets[g + 1]; at += kUnit, ++unit) {
          begins[unit][0] = at;
          begins[unit][1] = at + kUnit < c.offsets[g + 1] ? at + kUnit : c.offsets[g + 1];
        }
      parallel_for(pool, units * call.batch, [&](int64_t index) {
        auto& memory = *(Scratch*)scratch(sizeof(Scratch));
        memory.rows.find(c, begins[index % units][0], begins[index % units][1]);
        body(Values{call, c, memory, n == 0}, index / units);
      });
      free(begins);
    }
  }

  /// Calls body(from, to) for the blocks that the unit's rows need.
  template <int kSize, class Body> SPLAT_INLINE void for_blocks(Body&& body) const {
    const Rows& rows = memory.rows;
    const int64_t columns = ceil_div(call.columns - rows.residue, component.stride);
    int64_t from = call.savings.spans ? rows.low : 0, to = call.savings.spans ? rows.high : columns;
    if (!call.savings.anchors) from = floor_to(from, kSize);
    for (; from < to; from += kSize) body((int)from, (int)(from + kSize < to ? from + kSize : to));
  }

  /// Of rows r ... r + R, the columns [from, to) of a block that some of them have; whether there are any.
  SPLAT_INLINE bool cut(int r, int& from, int& to) const {
    if (!call.savings.anchors) return true;
    const Rows& rows = memory.rows;
    int low = 1 << 30, high = -(1 << 30);
    for (int n = r; n < r + R && n < rows.num_rows; ++n) {
      if (rows.lower[n] < low) low = rows.lower[n];
      if (rows.upper[n] > high) high = rows.upper[n];
    }
    if (low > from) from = low;
    if (high < to) to = high;
    return from < to;
  }

  /// Calls body(number of the first value, x of it, values) for what row n has in [from, to).
  template <class Body> SPLAT_INLINE void values_in(int n, int from, int to, Body&& body) const {
    const int hop = (int)component.hop, lower = memory.rows.lower[n], upper = memory.rows.upper[n];
    auto number = [&](int columns) { return hop == 1 ? columns : (columns + hop - 1) / hop; };
    const int begin = from > lower ? number(from - lower) : 0, end = number((to < upper ? to : upper) - lower);
    if (begin < end && from < upper && to > lower) body(begin, lower + hop * begin, end - begin);
  }

  SPLAT_INLINE int64_t place(int64_t batch, int n) const { return batch * call.size + memory.rows.place[n]; }

  /// [n][x - from] of rows r ... r + R; 0 where a row has nothing, and in rows that there are not.
  SPLAT_INLINE void gather(int64_t batch, int r, int num, int from, int to, T* tile, int64_t tile_row) const {
    const T* const values = (const T*)call.values;
    const Rows& rows = memory.rows;
    for (int n = r; n < r + num; ++n, tile += tile_row) {
      if (n < rows.num_rows && component.hop == 1 && to - from <= kShortest) {  // quicker than calls for a few numbers
        const int64_t at = place(batch, n) + from - rows.lower[n];
        const Int<T> lower = rows.lower[n] - from, upper = rows.upper[n] - from;
        if (at >= 0 && at + kShortest <= call.batch * call.size)
          for (int x = 0; x < kShortest; x += W) {
            const Vec<Int<T>> lane = lane_numbers<T>() + x;
            store(tile + x, (lane >= lower) & (lane < upper) ? load(values + at + x) : Vec<T>{});
          }
        else
          for (int x = 0; x < to - from; ++x) tile[x] = x >= lower && x < upper ? values[at + x] : (T)0;
        continue;
      }
      memset(tile, 0, (to - from) * sizeof(T));
      if (n >= rows.num_rows) continue;
      values_in(n, from, to, [&](int t, int x, int count) {
        const T* const own = values + place(batch, n) + t;
        if (component.hop == 1) memcpy(tile + x - from, own, count * sizeof(T));
        else
          for (int k = 0; k < count; ++k) tile[x - from + component.hop * k] = own[k];
      });
    }
  }

  /// Rows `at(n)` of a dense array, [n][Dp].
  template <class Type, class At> SPLAT_INLINE static void pack(const Type* from, int count, T* to, At&& at) {
    for (int n = 0; n < count; ++n, to += Dp) {
      const int64_t row = at(n);
      if (row < 0 || Dp > D) memset(to, 0, Dp * sizeof(T));
      if (row >= 0) pack_rows<Type, D>(from, D, row, 1, 1, to);
    }
  }

  /// C[r][d] += of `n` numbers, for all d.
  template <class A> static __attribute__((noinline)) void add_products(const A& a, const T* b, int n, T* c) {
    constexpr int whole = Dp / (NV * W) * (NV * W), rest = (Dp - whole) / W;
    for (int d = 0; d < whole; d += NV * W) product<T, R, NV, true>(a, b + d, Dp, n, c + d, Dp);
    if constexpr (rest > 0) product<T, R, rest, true>(a, b + whole, Dp, n, c + whole, Dp);
  }

  // -- R-SDDMM -------------------------------------------------------------------------------------------------------

  void sddmm(int64_t batch) {
    Rows& rows = memory.rows;
    const Scalar* const left = (const Scalar*)call.left + batch * call.rows * D;
    const Scalar* const right = (const Scalar*)call.right + batch * call.columns * D;
    T* const values = (T*)call.result;
    for (int n = 0; n < rows.num_rows; ++n) pack_rows<Scalar, D>(left, D, rows.row[n], 1, 1, memory.a + n * D);
    for_blocks<kWide>([&](int from, int to) {
      for (int lane = 0; lane < to - from; lane += kLanes) {
        LaneRows columns;
        for (int n = 0; n < kLanes; ++n) {
          const int x = from + lane + n;
          columns.at[n] = x < to ? (int32_t)(rows.residue + component.stride * x) : -1;
        }
        rows_to_lanes<Scalar, D>(right, D, columns, (T)1, memory.b + lane * D);
      }
      for (int r = 0; r < rows.num_rows; r += R) {
        int begin = from, end = to;
        if (!cut(r, begin, end)) continue;
        for (int lane = (begin - from) / W * W, vectors; lane < end - from; lane += vectors * W) {
          const int past = lane % kLanes, left = end - from - lane;
          vectors = (left < kLanes - past ? left + W - 1 : kLanes - past) / W;
          if (vectors > NV) vectors = NV;
          with_vectors<NV>(vectors, memory.a + r * D, memory.b + (lane - past) * D + past, memory.c + lane);
        }
        for (int n = r; n < r + R && n < rows.num_rows; ++n)
          values_in(n, begin, end, [&](int t, int x, int count) {
            T* const own = values + place(batch, n) + t;
            const T* const made = memory.c + (n - r) * kWide + x - from;
            if (component.hop == 1) memcpy(own, made, count * sizeof(T));
            else
              for (int k = 0; k < count; ++k) own[k] = made[component.hop * k];
          });
      }
    });
    for (int n = 0; n < rows.num_rows; ++n) pad(component, rows.row[n], values + batch * call.size);
  }

  template <int N> SPLAT_INLINE static void with_vectors(int vectors, const T* a, const T* b, T* c) {
    if constexpr (N > 1)
      if (vectors < N) return with_vectors<N - 1>(vectors, a, b, c);
    scores_of<N>(a, b, c);
  }
  template <int N> static __attribute__((noinline)) void scores_of(const T* a, const T* b, T* c) {
    product<T, R, N, false>(Strided<T>{a, D, 1}, b, kLanes, D, c, kWide);
  }

  // -- R-SpMM --------------------------------------------------------------------------------------------------------

  void spmm(int64_t batch) {
    Rows& rows = memory.rows;
    const Scalar* const right = (const Scalar*)call.right + batch * call.columns * D;
    Result* const out = (Result*)call.result + batch * call.rows * D;
    if (first) memset(memory.c, 0, sizeof(T) * rows.num_rows * Dp);
    else pack(out, rows.num_rows, memory.c, [&](int n) { return rows.row[n]; });
    if (const T* const dense = in_place(right))
      for_blocks<kInPlace>([&](int from, int to) { add_block(batch, dense + from * (int64_t)D, from, to); });
    else
      for_blocks<kBlock>([&](int from, int to) {
        bring(right, from, to);
        add_block(batch, memory.b, from, to);
      });
    for (int n = 0; n < rows.num_rows; ++n)
      put_row<Result, D>(memory.c + n * Dp, out + rows.row[n] * (int64_t)D, false);
  }

  /// The other side where its rows need not be brought together: it is of the compute type, and all columns are used.
  SPLAT_INLINE const T* in_place(const Scalar* right) const {
    const bool together = component.stride == 1 && component.hop == 1 && memory.rows.dense;
    if constexpr (sizeof(Scalar) == sizeof(T) && D == Dp)
      if (together && call.savings.spans && call.savings.anchors) return (const T*)right;
    return nullptr;
  }

  /// memory.b = rows of the columns [from, to); what no row has may hold anything, and counts as 0.
  void bring(const Scalar* right, int from, int to) {
    const Rows& rows = memory.rows;
    int32_t change[kBlock + 1] = {};
    for (int n = 0; n < rows.num_rows; ++n) {
      const int begin = rows.lower[n] > from ? rows.lower[n] : from, end = rows.upper[n] < to ? rows.upper[n] : to;
      if (begin < end) ++change[begin - from], --change[end - from];
    }
    int32_t number = 0;
    pack(right, to - from, memory.b, [&](int n) -> int64_t {
      number += change[n];
      return number ? rows.residue + component.stride * (from + n) : -1;
    });
  }

  /// Adds what the unit's rows have of the columns [from, to), whose rows `dense` are.
  void add_block(int64_t batch, const T* dense, int from, int to) {
    const Rows& rows = memory.rows;
    for (int r = 0; r < rows.num_rows; r += R) {
      int begin = from, end = to;
      if (!cut(r, begin, end)) continue;
      int x1 = begin, x2 = component.hop == 1 && r + R <= rows.num_rows ? end : begin;  // what all rows have
      for (int n = r; n < r + R && x1 < x2; ++n) {
        if (rows.lower[n] > x1) x1 = rows.lower[n];
        if (rows.upper[n] < x2) x2 = rows.upper[n];
      }
      auto edge = [&](int from_, int to_) {
        gather(batch, r, R, from_, to_, memory.a, kInPlace);
        add_products(Strided<T>{memory.a, kInPlace, 1}, dense + (from_ - from) * Dp, to_ - from_, memory.c + r * Dp);
      };
      if (x2 - x1 < kShortest) {
        edge(begin, end);
        continue;
      }
      if (begin < x1) edge(begin, x1);
      InPlace<T, R> values;
      for (int n = 0; n < R; ++n)
        values.row[n] = (const T*)call.values + place(batch, r + n) + x1 - rows.lower[r + n];
      add_products(values, dense + (x1 - from) * Dp, x2 - x1, memory.c + r * Dp);
      if (x2 < end) edge(x2, end);
    }
  }

  // -- its transpose -------------------------------------------------------------------------------------------------

  /// Columns [from, from + kColumns) of the lattice of group g; rows [begin, end) of `order` hold all that have some.
  void spmm_transposed(int64_t batch, int64_t residue, int from, int begin, int end) {
    Rows& rows = memory.rows;
    const Scalar* const left = (const Scalar*)call.left + batch * call.rows * D;
    Result* const out = (Result*)call.result + batch * call.columns * D;
    const int64_t columns = ceil_div(call.columns - residue, component.stride);
    const int to = (int)(from + kColumns < columns ? from + kColumns : columns);
    auto column = [&](int n) { return from + n < to ? residue + component.stride * (from + n) : -1; };
    if (first) memset(memory.c, 0, sizeof(T) * kColumns * Dp);
    else pack(out, kColumns, memory.c, column);
    for (int at = begin; at < end;) {
      rows.clear();
      for (; at < end && rows.num_rows < kChunk; ++at) {
        rows.add(component, component.order[at]);
        const int n = rows.num_rows - 1;
        if (rows.lower[n] >= to || rows.upper[n] <= from) --rows.num_rows;
      }
      const int count = rows.num_rows;
      pack(left, count, memory.b, [&](int n) { return rows.row[n]; });
      gather(batch, 0, count, from, to, memory.a, kColumns);
      for (int x = from; x < to; x += R) {
        int low = 0, high = count;
        auto has = [&](int n) { return rows.lower[n] < x + R && rows.upper[n] > x; };
        while (low < high && !has(low)) ++low;
        while (low < high && !has(high - 1)) --high;
        if (low < high)
          add_products(Strided<T>{memory.a + low * kColumns + x - from, 1, kColumns}, memory.b + low * Dp, high - low,
                       memory.c + (x - from) * Dp);
      }
    }
    for (int n = 0; n < to - from; ++n) put_row<Result, D>(memory.c + n * Dp, out + column(n) * D, false);
  }

  /// For every block of columns of every group, the rows of `order` from the first to the last that have some of them.
  struct Extents {
    int64_t blocks;        // of a group, at most
    int32_t (*rows)[2];    // [groups][blocks]
    int64_t* residues;     // [groups]

    Extents(const ValuesCall& call, const Component& c) : blocks(ceil_div(ceil_div(call.columns, c.stride), kColumns)) {
      rows = (int32_t(*)[2])calloc(c.groups * blocks + 1, sizeof(int32_t[2]));
      residues = (int64_t*)calloc(c.groups + 1, sizeof(int64_t));
      if (!rows || !residues) abort();
      Rows one;
      for (int64_t g = 0; g < c.groups; ++g)
        for (int32_t n = c.offsets[g]; n < c.offsets[g + 1]; ++n) {
          one.find(c, n, n + 1);
          if (one.low >= one.high) continue;
          residues[g] = one.residue;
          for (int64_t b = one.low / kColumns; b <= (one.high - 1) / kColumns; ++b) {
            auto& extent = rows[g * blocks + b];
            if (!extent[1]) extent[0] = n;
            extent[1] = n + 1;
          }
        }
    }
    ~Extents() { free(rows), free(residues); }
    Extents(const Extents&) = delete;
  };

  static void transposed(const ValuesCall& call, Pool& pool) {
    // Where the first component's groups may leave out columns, all begin at 0.
    const bool clear = call.num_components == 0 || call.components[0].stride != 1;
    if (clear)
      parallel_for(pool, call.batch, [&](int64_t batch) {
        memset((Result*)call.result + batch * call.columns * D, 0, sizeof(Result) * call.columns * D);
      });
    for (int64_t n = 0; n < call.num_components; ++n) {
      const Component& c = call.components[n];
      const Extents extents(call, c);
      const int64_t units = c.groups * extents.blocks;
      parallel_for(pool, units * call.batch, [&](int64_t index) {
        const int64_t unit = index % units, block = unit % extents.blocks;
        const int64_t residue = extents.residues[unit / extents.blocks];
        const int32_t(&rows)[2] = extents.rows[unit];
        const bool none = rows[0] >= rows[1], first = n == 0 && !clear;
        if ((none && !first) || block * kColumns >= ceil_div(call.columns - residue, c.stride)) return;
        auto& memory = *(Scratch*)scratch(sizeof(Scratch));
        Values values{call, c, memory, first};
        values.spmm_transposed(index / units, residue, (int)(block * kColumns), rows[0], rows[1]);
      });
    }
  }
};

template <class Facts> void sddmm(const ValuesCall& call, Pool& pool) {
  Values<Facts>::for_rows(call, pool, [](auto unit, int64_t batch) { unit.sddmm(batch); });
}

template <class Facts> void spmm(const ValuesCall& call, Pool& pool) {
  Values<Facts>::for_rows(call, pool, [](auto unit, int64_t batch) { unit.spmm(batch); });
}

template <class Facts> void spmm_transposed(const ValuesCall& call, Pool& pool) {
  Values<Facts>::transposed(call, pool);
}

}  // namespace splat
