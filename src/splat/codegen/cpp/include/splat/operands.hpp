// What the matrix products of attention read: rows in the lanes, walked rows, and weights.
//
// They are numbers of the compute type, or, for bfloat16 on processors that multiply pairs of them faster, pairs: two
// neighbours of a row for scores, the same element of two neighbouring rows for sums.
#pragma once
#include "splat/tile.hpp"

namespace splat {

#ifdef SPLAT_PAIRS
template <class Facts> constexpr bool kPaired = __is_same(typename Facts::Scalar, bfloat16);
#else
template <class Facts> constexpr bool kPaired = false;
#endif

/// Walked rows: for scores kDepth elements each, for sums D.
template <class Element> struct Walked {
  const Element *rows, *sums;
};

/// Numbers.
template <class Facts, bool = kPaired<Facts>> struct Operands {
  using Scalar = typename Facts::Scalar;
  using T = Compute<Scalar>;
  using Element = T;
  static constexpr int D = Facts::head_dim, kDepth = D;

  /// Of n walked rows. kScores, kSums: what they are read for.
  template <int n, bool kScores, bool kSums> struct Memory {
    static constexpr int kRowBytes = D * (int)sizeof(T);
    alignas(64) T rows[n * D];
  };

  static bool in_place(const Array& array, int64_t step) { return step == 1 && is_packed<Scalar, D>(array); }

  static constexpr bool kCopiesAhead = true;
  /// Copies a row of an array's head to a place in the memory.
  template <class M>
  static SPLAT_INLINE void copy_row(const Array& array, int64_t batch, int64_t head, int64_t row, int place,
                                    M& memory) {
    pack_rows<Scalar, D>(at<Scalar>(array, batch, head), array.position, row, 0, 1, memory.rows + place * D);
  }

  /// lanes[d][lane] of an array's head. `factor` is multiplied into them here, or by `scaled` into their scores.
  static SPLAT_INLINE void lanes(const Array& array, int64_t batch, int64_t head, const LaneRows& rows, T factor,
                                 T* to) {
    rows_to_lanes<Scalar, D>(at<Scalar>(array, batch, head), array.position, rows, factor, to);
  }
  static SPLAT_INLINE Vec<T> scaled(Vec<T> score, T) { return score; }

  /// Rows `from + step * n` of an array's head: where they are, or in memory from `place` on, where the last `fresh`
  /// are missing.
  template <class M>
  static Walked<T> bring(const Array& array, int64_t batch, int64_t head, int64_t from, int64_t step, int count,
                         int place, int fresh, M& memory) {
    const T* const rows =
        walked_rows<Scalar, D>(array, batch, head, from, step, count, fresh, memory.rows + place * D);
    return {rows, rows};
  }

  /// Weights [n][lane] as sums take them, in the place of p; made(k, v) makes a vector of row k's, v = 0 to NV - 1.
  template <int NV, class Made> static SPLAT_INLINE const T* weights(T* p, int n, Made&& made) {
    for (int k = 0; k < n; ++k) {
      SPLAT_UNROLL
      for (int v = 0; v < NV; ++v) store(p + k * kLanes + v * kWidth<T>, made(k, v));
    }
    return p;
  }
  /// Of weights that are in p.
  template <int NV> static SPLAT_INLINE const T* weights(T* p, int) { return p; }

  /// out[d][lane] += sum_k walked[k][d] * weights[k][lane]; kN: as `product` says; before(): as `accumulate` says.
  template <int NV, int kN = 0, class Before = Nothing>
  static SPLAT_INLINE void sum(const T* walked, const T* weights, int n, T* out, Before&& before = {}) {
    accumulate<T, D, NV, kN>(walked, D, weights, n, out, before);
  }
};

#ifdef SPLAT_PAIRS
/// Pairs: the first number in the lower half.
template <class Facts> struct Operands<Facts, true> {
  using T = float;
  using Element = uint32_t;
  static constexpr int D = Facts::head_dim, kDepth = (D + 1) / 2, W = kWidth<T>;

  template <int n, bool kScores, bool kSums> struct Memory {
    static constexpr int kRowBytes = ((kScores ? kDepth : 0) + (kSums ? D : 0)) * 4;
    static constexpr bool kHasScores = kScores, kHasSums = kSums;
    alignas(64) uint32_t rows[kScores ? n * kDepth : 1];
    alignas(64) uint32_t sums[kSums ? n * D : 1];  // row n with row n + 1, where that is there
  };

  static bool in_place(const Array&, int64_t) { return false; }
  static constexpr bool kCopiesAhead = false;  // rows are paired with their neighbours

  static SPLAT_INLINE void lanes(const Array& array, int64_t batch, int64_t head, const LaneRows& rows, T,
                                 uint32_t* to) {
    constexpr int whole = D / (2 * W) * W;
    const bfloat16* const from = at<bfloat16>(array, batch, head);
    for (int lane = 0; lane < kLanes; lane += W) {
      const bfloat16* row[W];
      for (int n = 0; n < W; ++n) row[n] = rows.at[lane + n] < 0 ? none : from + rows.at[lane + n] * array.position;
      for (int d = 0; d < whole; d += W) {
        Vec<float> square[W];
        SPLAT_UNROLL
        for (int n = 0; n < W; ++n) memcpy(&square[n], row[n] + 2 * d, 64);
        transpose<float>(square);
        SPLAT_UNROLL
        for (int n = 0; n < W; ++n) memcpy(to + (d + n) * kLanes + lane, &square[n], 64);
      }
      for (int d = whole; d < kDepth; ++d)
        for (int n = 0; n < W; ++n) to[d * kLanes + lane + n] = row_pair(row[n], d);
    }
  }
  static SPLAT_INLINE Vec<T> scaled(Vec<T> score, T factor) { return score * factor; }

  template <class M>
  static Walked<uint32_t> bring(const Array& array, int64_t batch, int64_t head, int64_t first, int64_t step,
                                int count, int place, int fresh, M& memory) {
    const int missing = count - fresh;  // the first of them
    const bfloat16* const from = at<bfloat16>(array, batch, head) + (first + step * missing) * array.position;
    const int64_t next = step * array.position;
    if constexpr (M::kHasScores) {
      uint32_t* to = memory.rows + (place + missing) * kDepth;
      for (int n = 0; n < fresh; ++n, to += kDepth) {
        if (n + kSoon < fresh) ask_for<bfloat16, D>(from + (n + kSoon) * next);
        memcpy(to, from + n * next, D / 2 * 4);
        if constexpr (D % 2) to[kDepth - 1] = row_pair(from + n * next, kDepth - 1);
      }
    }
    if constexpr (M::kHasSums) {
      constexpr int whole = D / W * W;
      uint32_t* to = memory.sums + (place + missing) * D;
      if (place + missing > 0 && fresh > 0) {  // what is there may be of another chunk, which never reads this half
        uint32_t* const before = to - D;
        for (int d = 0; d < whole; d += W)
          store(before + d, (load(before + d) & 0xffff) | lower_halves(from + d) << 16);
        for (int d = whole; d < D; ++d) before[d] = (before[d] & 0xffff) | (uint32_t)from[d].bits << 16;
      }
      for (int n = 0; n < fresh; ++n, to += D) {
        if (!M::kHasScores && n + kSoon < fresh) ask_for<bfloat16, D>(from + (n + kSoon) * next);
        const bfloat16 *const row = from + n * next, *const other = n + 1 < fresh ? row + next : none;
        for (int d = 0; d < whole; d += W) store(to + d, paired(row + d, other + d));
        for (int d = whole; d < D; ++d) to[d] = row[d].bits | (uint32_t)other[d].bits << 16;
      }
    }
    return {M::kHasScores ? memory.rows + place * kDepth : nullptr, M::kHasSums ? memory.sums + place * D : nullptr};
  }

  template <int NV, class Made> static SPLAT_INLINE const uint32_t* weights(T* p, int n, Made&& made) {
    uint32_t* const to = (uint32_t*)p;
    int k = 0;
    for (; k + 2 <= n; k += 2) {
      SPLAT_UNROLL
      for (int v = 0; v < NV; ++v) {
        const Vec<T> first = made(k, v);
        store(to + k / 2 * kLanes + v * W, paired(first, made(k + 1, v)));
      }
    }
    for (int v = 0; v < NV && k < n; ++v) store(to + k / 2 * kLanes + v * W, paired(made(k, v), Vec<T>{}));
    return to;
  }
  template <int NV> static SPLAT_INLINE const uint32_t* weights(T* p, int n) {
    return weights<NV>(p, n, [&](int k, int v) SPLAT_INLINED { return load(p + k * kLanes + v * W); });
  }

  template <int NV, int kN = 0, class Before = Nothing>
  static SPLAT_INLINE void sum(const uint32_t* walked, const uint32_t* weights, int n, T* out, Before&& before = {}) {
    accumulate<T, D, NV, kN / 2>(walked, 2 * D, weights, n / 2, out, before);
    if (kN % 2 || (kN == 0 && n % 2)) last<NV>(walked + (n - 1) * D, weights + n / 2 * kLanes, out);
  }

 private:
  alignas(64) static constexpr bfloat16 none[D] = {};

  static SPLAT_INLINE uint32_t row_pair(const bfloat16* row, int d) {
    return row[2 * d].bits | (2 * d + 1 < D ? (uint32_t)row[2 * d + 1].bits << 16 : 0);
  }
  /// What the last row adds, without the next one.
  template <int NV>
  static __attribute__((noinline)) void last(const uint32_t* walked, const uint32_t* weights, T* out) {
    alignas(64) uint32_t alone[D];
    for (int d = 0; d < D; ++d) alone[d] = walked[d] & 0xffff;
    accumulate<T, D, NV, 1>(alone, D, weights, 1, out);
  }
};
#endif

}  // namespace splat
