// The matrix products of attention on vector registers.
//
// A row tile lies across the lanes: 64 rows (queries, or keys for dK and dV) of which a kernel works on some vectors.
// The other side is walked: its rows are read one number at a time, and never have to be packed or transposed.
//
//     scores       S[n][lane]  =  sum_d  walked[n][d] * lanes[d][lane]           (Q K^T, dO V^T)
//     accumulate   C[d][lane] +=  sum_n  walked[n][d] * P[n][lane]               (P V, dS K, dS^T Q, P^T dO)
//     spread       C[n][d]    +=  sum_lane  P[n][lane] * rows[lane][d]           (P^T dO, dS^T Q, keys being walked)
#pragma once
#include "splat/vector.hpp"

namespace splat {

constexpr int kLanes = 64;  // of a row tile
constexpr int kGroup = 16;  // of a group: what spans are exact for
constexpr int kGroups = kLanes / kGroup;

/// Room for the columns of a block. Its scores pass through the second-level cache: that costs less than reading and
/// writing the sums more often.
constexpr int kBlockColumns = 192;

/// Vectors of a lane block: with R rows they fill the registers.
constexpr int kMaxVectors = kRegisters == 32 ? 4 : 2;
template <int NV> constexpr int kRows = kRegisters == 32 ? (NV == 4 ? 6 : NV == 3 ? 8 : NV == 2 ? 12 : 16) : NV == 2 ? 6 : 10;

template <class T, int D, int R, int NV, bool kMax>
SPLAT_INLINE void scores_micro(const T* walked, const T* lanes, T* out, Vec<T> (&most)[NV]) {
  constexpr int W = kWidth<T>;
  Vec<T> sum[R][NV] = {};
  SPLAT_UNROLL2
  for (int d = 0; d < D; ++d) {
    Vec<T> lane[NV];
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) lane[v] = load(lanes + d * kLanes + v * W);
    SPLAT_UNROLL
    for (int r = 0; r < R; ++r) {
      const T x = walked[r * D + d];
      SPLAT_UNROLL
      for (int v = 0; v < NV; ++v) sum[r][v] += x * lane[v];
    }
  }
  SPLAT_UNROLL
  for (int r = 0; r < R; ++r) {
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) {
      store(out + r * kLanes + v * W, sum[r][v]);
      if constexpr (kMax) most[v] = larger<T>(most[v], sum[r][v]);
    }
  }
}

/// `most` becomes the largest score of each lane where `kMax`.
template <class T, int D, int NV, bool kMax>
SPLAT_INLINE void scores(const T* walked, const T* lanes, int n, T* out, Vec<T> (&most)[NV]) {
  constexpr int R = kRows<NV>;
  int r = 0;
  for (; r + R <= n; r += R) scores_micro<T, D, R, NV, kMax>(walked + r * D, lanes, out + r * kLanes, most);
  if constexpr (R > 4)
    for (; r + 4 <= n; r += 4) scores_micro<T, D, 4, NV, kMax>(walked + r * D, lanes, out + r * kLanes, most);
  for (; r < n; ++r) scores_micro<T, D, 1, NV, kMax>(walked + r * D, lanes, out + r * kLanes, most);
}

template <class T, int D, int R, int NV>
SPLAT_INLINE void accumulate_micro(const T* walked, const T* p, int n, T* out) {
  constexpr int W = kWidth<T>;
  Vec<T> sum[R][NV];
  SPLAT_UNROLL
  for (int r = 0; r < R; ++r) {
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) sum[r][v] = load(out + r * kLanes + v * W);
  }
  SPLAT_UNROLL2
  for (int k = 0; k < n; ++k) {
    Vec<T> lane[NV];
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) lane[v] = load(p + k * kLanes + v * W);
    SPLAT_UNROLL
    for (int r = 0; r < R; ++r) {
      const T x = walked[k * D + r];
      SPLAT_UNROLL
      for (int v = 0; v < NV; ++v) sum[r][v] += x * lane[v];
    }
  }
  SPLAT_UNROLL
  for (int r = 0; r < R; ++r) {
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) store(out + r * kLanes + v * W, sum[r][v]);
  }
}

template <class T, int D, int NV> SPLAT_INLINE void accumulate(const T* walked, const T* p, int n, T* out) {
  constexpr int R = kRows<NV>, rest = D % R;
  int d = 0;
  for (; d + R <= D; d += R) accumulate_micro<T, D, R, NV>(walked + d, p, n, out + d * kLanes);
  if constexpr (rest > 0) accumulate_micro<T, D, rest, NV>(walked + d, p, n, out + d * kLanes);
}

template <class T, int R, int NV>
SPLAT_INLINE void spread_micro(const T* p, int lanes, const T* rows, int64_t row, T* out, int64_t out_row) {
  constexpr int W = kWidth<T>;
  Vec<T> sum[R][NV];
  SPLAT_UNROLL
  for (int r = 0; r < R; ++r) {
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) sum[r][v] = load(out + r * out_row + v * W);
  }
  for (int i = 0; i < lanes; ++i) {
    Vec<T> part[NV];
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) part[v] = load(rows + i * row + v * W);
    SPLAT_UNROLL
    for (int r = 0; r < R; ++r) {
      const T x = p[r * kLanes + i];
      SPLAT_UNROLL
      for (int v = 0; v < NV; ++v) sum[r][v] += x * part[v];
    }
  }
  SPLAT_UNROLL
  for (int r = 0; r < R; ++r) {
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) store(out + r * out_row + v * W, sum[r][v]);
  }
}

template <class T, int D, int NV>
SPLAT_INLINE void spread_columns(const T* p, int n, int lanes, const T* rows, T* out, int64_t out_row) {
  constexpr int R = kRows<NV>;
  int k = 0;
  for (; k + R <= n; k += R) spread_micro<T, R, NV>(p + k * kLanes, lanes, rows, D, out + k * out_row, out_row);
  if constexpr (R > 4)
    for (; k + 4 <= n; k += 4) spread_micro<T, 4, NV>(p + k * kLanes, lanes, rows, D, out + k * out_row, out_row);
  for (; k < n; ++k) spread_micro<T, 1, NV>(p + k * kLanes, lanes, rows, D, out + k * out_row, out_row);
}

/// D is a multiple of the vectors' width.
template <class T, int D> SPLAT_INLINE void spread(const T* p, int n, int lanes, const T* rows, T* out, int64_t out_row) {
  constexpr int W = kWidth<T>, NV = kMaxVectors, whole = D / (NV * W) * (NV * W), rest = (D - whole) / W;
  for (int d = 0; d < whole; d += NV * W) spread_columns<T, D, NV>(p, n, lanes, rows + d, out + d, out_row);
  if constexpr (rest > 0) spread_columns<T, D, rest>(p, n, lanes, rows + whole, out + whole, out_row);
}

}  // namespace splat
