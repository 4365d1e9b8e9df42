// Intel's matrix tiles for bfloat16: registers of 16 rows of 64 bytes, C[16][16] += A[16][32] B[32][16].
//
// B's rows are pairs: element [i][lane] holds two numbers, of k = 2 i and 2 i + 1. Pairs may be any two as long as A
// has them in the same order; walked rows are paired as (r, 16 + r).
#pragma once
#include "splat/tiles.hpp"
#include "splat/walk.hpp"

namespace splat {

constexpr int kTileBytes = 1024;
constexpr int kPart = 32;  // lanes that are worked on at once, and walked rows of a chunk
/// Of a chunk's B tiles, as `rows_to_columns` and `pair_rows` leave them.
template <int Dp> constexpr int kColumnBytes = Dp / 32 * 2 * kTileBytes;
template <int Dp> constexpr int kPairBytes = Dp / 16 * kTileBytes;

/// 32 rows of Dp numbers, `step` numbers from one to the next.
struct Rows {
  const bfloat16* at;
  int64_t step;
};

/// Rows of D numbers, of which `count` are there; where not all are, or D is less than Dp, copies with zeros.
template <int D, int Dp> SPLAT_INLINE Rows padded(Rows rows, int count, bfloat16* memory) {
  if (D == Dp && count == 32) return rows;
  memset(memory, 0, 32 * Dp * sizeof *memory);
  for (int n = 0; n < count; ++n) memcpy(memory + n * Dp, rows.at + n * rows.step, D * sizeof *memory);
  return {memory, Dp};
}

/// Rows `from + step * n` of an array's head, those of a chunk of which `left` are there and may be followed by more.
template <int D, int Dp>
SPLAT_INLINE Rows chunk_rows(const Array& array, int64_t batch, int64_t head, int64_t from, int64_t step, int left,
                             bfloat16* memory) {
  const Rows here{at<bfloat16>(array, batch, head) + from * array.position, step * array.position};
  return padded<D, Dp>(here, left < kPart ? left : kPart, memory);
}

/// Rows with zeros for those whose base is infinite: queries without any key, which may hold anything.
template <int Dp> SPLAT_INLINE Rows with_base(Rows rows, const float* base, bfloat16* memory) {
  bool all = true;
  for (int n = 0; n < 32; ++n) all &= base[n] != kInfinity<float>;
  if (all) return rows;
  for (int n = 0; n < 32; ++n)
    if (base[n] == kInfinity<float>) memset(memory + n * Dp, 0, Dp * sizeof *memory);
    else if (rows.at != memory) memcpy(memory + n * Dp, rows.at + n * rows.step, Dp * sizeof *memory);
  return {memory, Dp};
}

/// Rows of the lanes: [lane][Dp], padded with zeros.
template <int D, int Dp>
SPLAT_INLINE void pack_lanes(const bfloat16* from, int64_t position, const LaneRows& rows, bfloat16* to) {
  for (int lane = 0; lane < kLanes; ++lane, to += Dp) {
    const int64_t at = rows.at[lane];
    if (at < 0 || Dp > D) memset(to, 0, Dp * sizeof *to);
    if (at >= 0) memcpy(to, from + at * position, D * sizeof *to);
  }
}

/// 32 numbers, rounded.
SPLAT_INLINE Vec<float> bfloat16s(Vec<float> first, Vec<float> second) {
  Vec<float> out;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(out) : "v"(first), "v"(second));
  return out;
}

/// B tiles of 32 rows, [Dp / 32][first, second 16 rows]: element [i][2 n], [i][2 n + 1] is row n's d = 2 i and the
/// next.
template <int Dp> SPLAT_INLINE void rows_to_columns(Rows rows, char* tiles) {
  for (int d = 0; d < Dp; d += 32)
    for (int half = 0; half < 2; ++half, tiles += kTileBytes) {
      Vec<float> square[16];
      SPLAT_UNROLL
      for (int n = 0; n < 16; ++n) memcpy(&square[n], rows.at + (half * 16 + n) * rows.step + d, 64);
      transpose<float>(square);
      SPLAT_UNROLL
      for (int n = 0; n < 16; ++n) memcpy(tiles + n * 64, &square[n], 64);
    }
}

/// B tiles of 32 rows, [Dp / 16]: element [r][2 d], [r][2 d + 1] is that of rows r and 16 + r. Returns whether all
/// of them are finite.
template <int Dp> SPLAT_INLINE bool pair_rows(Rows rows, char* tiles) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  Halves largest = {};  // magnitude
  for (int r = 0; r < 16; ++r)
    SPLAT_UNROLL
    for (int d = 0; d < Dp; d += 16) {
      const Vec<uint32_t> pair = paired(rows.at + r * rows.step + d, rows.at + (16 + r) * rows.step + d);
      const Halves magnitude = bits_as<Halves>(pair) & 0x7fff;
      largest = largest > magnitude ? largest : magnitude;
      memcpy(tiles + d / 16 * kTileBytes + r * 64, &pair, sizeof pair);
    }
  return !any<float>(bits_as<Vec<int32_t>>((Halves)(largest >= 0x7f80)));
}

// -- 32 lanes by 32 walked rows ---------------------------------------------------------------------------------------

/// Step n of 4 * Dp / 32 of the products of 32 lanes, rows of Dp, with 32 walked rows, columns as `rows_to_columns`
/// leaves them. The last one writes them, [first, second 16 lanes][first, second 16 walked rows]. n is known to the
/// compiler.
template <int Dp> SPLAT_INLINE void score_step(const bfloat16* lanes, const char* columns, char* to, int n) {
  lanes += n / 4 * 32, columns += n / 4 * 2 * kTileBytes;
  if (n == 0) tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  if (n % 4 == 0) tile_load<4>(lanes, Dp * 2), tile_load<6>(columns, 64), tile_dot<0, 4, 6>();
  if (n % 4 == 1) tile_load<7>(columns + kTileBytes, 64), tile_dot<1, 4, 7>();
  if (n % 4 == 2) tile_load<5>(lanes + 16 * Dp, Dp * 2), tile_dot<2, 5, 6>();
  if (n % 4 == 3) tile_dot<3, 5, 7>();
  if (n + 1 < 4 * (Dp / 32)) return;
  tile_store<0>(to, 64), tile_store<1>(to + kTileBytes, 64);
  tile_store<2>(to + 2 * kTileBytes, 64), tile_store<3>(to + 3 * kTileBytes, 64);
}
/// Of a row of these products: those with the first or second 16 walked rows.
SPLAT_INLINE Vec<float> score_row(const char* scores, int row, int half) {
  return load((const float*)(scores + (row / 16 * 2 + half) * kTileBytes) + row % 16 * 16);
}

/// Step n of `steps`, four for each chunk of 32 walked rows, of sums[lane][32 columns] += weights[lane][walked row] *
/// values[walked row][32 columns]. `weights` are A tiles of the step's chunk, `values` two of its B tiles as
/// `pair_rows` leaves them. Before the first step sums count as 0 where `is_first`. n is known to the compiler.
template <int Dp>
SPLAT_INLINE void sum_step(const char* weights, const char* values, float* sums, int n, int steps, bool is_first) {
  constexpr int64_t kRow = Dp * sizeof(float);
  float* const second = sums + 16 * Dp;
  if (n == 0) {
    if (is_first) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
      tile_load<0>(sums, kRow), tile_load<1>(sums + 16, kRow);
      tile_load<2>(second, kRow), tile_load<3>(second + 16, kRow);
    }
  }
  if (n % 4 == 0) tile_load<4>(weights, 64), tile_load<6>(values, 64), tile_dot<0, 4, 6>();
  if (n % 4 == 1) tile_load<7>(values + kTileBytes, 64), tile_dot<1, 4, 7>();
  if (n % 4 == 2) tile_load<5>(weights + kTileBytes, 64), tile_dot<2, 5, 6>();
  if (n % 4 == 3) tile_dot<3, 5, 7>();
  if (n + 1 < steps) return;
  tile_store<0>(sums, kRow), tile_store<1>(sums + 16, kRow);
  tile_store<2>(second, kRow), tile_store<3>(second + 16, kRow);
}

/// lanes[lane][d] = array[row of the lane][d], 0 in lanes without a row.
template <int D, int Dp>
SPLAT_INLINE void take_lanes(const bfloat16* from, int64_t position, const LaneRows& rows, float* lanes) {
  constexpr int whole = D / 16 * 16;
  memset(lanes, 0, kLanes * Dp * sizeof *lanes);
  for (int lane = 0; lane < kLanes; ++lane, lanes += Dp) {
    if (rows.at[lane] < 0) continue;
    const bfloat16* const row = from + rows.at[lane] * position;
    for (int d = 0; d < whole; d += 16) store(lanes + d, load_as<bfloat16>(row + d));
    for (int d = whole; d < D; ++d) lanes[d] = to_compute(row[d]);
  }
}
/// array[row of the lane][d] = lanes[lane][d] * factor[lane]; lanes without a row are left out.
template <int D, int Dp>
SPLAT_INLINE void put_lanes(const float* lanes, const float* factor, const LaneRows& rows, bfloat16* to,
                            int64_t position, bool past_caches) {
  for (int lane = 0; lane < kLanes; ++lane, lanes += Dp) {
    if (rows.at[lane] < 0) continue;
    bfloat16* const row = to + rows.at[lane] * position;
    const Vec<float> times = splat_of(factor[lane]);
    if (past_caches) {
      for (int d = 0; d < D; d += 32)
        store_past_caches((float*)(row + d), bfloat16s(load(lanes + d) * times, load(lanes + d + 16) * times));
      continue;
    }
    for (int d = 0; d < D / 16 * 16; d += 16) store_as<bfloat16>(row + d, load(lanes + d) * times);
    for (int d = D / 16 * 16; d < D; ++d) row[d] = from_compute<bfloat16>(lanes[d] * factor[lane]);
  }
}

/// The columns of 32 lanes, two groups, in the columns [from, to), which come in chunks of 32.
template <class M> struct Part {
  const M& mask;
  int lane, from, to;
  Span span[2] = {};
  int begin, end;  // chunks of which some lane has columns

  Part(const M& mask_, const Span* const (&spans)[kGroups], int lane_, int from_, int to_)
      : mask(mask_), lane(lane_), from(from_), to(to_) {
    int low = to, high = from;
    for (int g = 0; g < 2; ++g) {
      const Span* own = spans[lane / kGroup + g];
      if (!own || own->x0 >= own->x3) continue;
      span[g] = *own;
      if (own->x0 < low) low = own->x0;
      if (own->x3 > high) high = own->x3;
    }
    if (low < from) low = from;
    if (high > to) high = to;
    begin = (low - from) / 32, end = low < high ? (high - from + 31) / 32 : begin;
  }

  bool is_full(int chunk) const {
    const int x = from + 32 * chunk;
    return x + 32 <= to && x >= span[0].x1 && x >= span[1].x1 && x + 32 <= span[0].x2 && x + 32 <= span[1].x2;
  }
  /// Whether rows have columns before x, those that have any where their group has some that all its rows have.
  bool all_begin_before(int x) const { return x > span[0].x1 && x > span[1].x1; }
  /// Which of 16 columns from x on a row has.
  template <bool kEdges> SPLAT_INLINE Vec<int32_t> keep(int x, int row) const {
    static constexpr Vec<int32_t> kNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Span& s = span[row / kGroup];
    const Vec<int32_t> at = kNumbers + x, some = (at >= s.x0) & (at < (s.x3 < to ? s.x3 : to));
    if constexpr (kEdges) return some & mask.keep_columns(at, lane + row);
    else return some;
  }
};

/// Whether all of [place, place + count) is, of what is said of each 32 of them.
inline bool all_of(const bool* each, int place, int count) {
  bool all = true;
  for (int n = 0; n < count; n += 32) all &= each[(place + n) / 32];
  return all;
}

/// B tiles of paired rows without those that no lane has, so that nothing of them reaches a result.
template <int Dp, bool kEdges, class M>
void clean_pairs(const Part<M>& part, int x, const char* pairs, char* to) {
  memcpy(to, pairs, kPairBytes<Dp>);
  for (int half = 0; half < 2; ++half) {
    Vec<int32_t> some = {};
    for (int row = 0; row < kPart; ++row) some |= part.template keep<kEdges>(x + half * 16, row);
    for (int r = 0; r < 16; ++r)
      for (int d = 0; d < Dp && !some[r]; ++d) ((uint16_t*)to)[d / 16 * 512 + r * 32 + d % 16 * 2 + half] = 0;
  }
}

}  // namespace splat
