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

constexpr int kGroup = 16;                                // of a group: what spans are exact for
constexpr int kLanes = kVectorBytes == 64 ? 64 : kGroup;  // of a row tile: a lane block's, so that it lies together
constexpr int kGroups = kLanes / kGroup;

/// Room for the columns of a block. Its scores pass through the second-level cache: that costs less than reading and
/// writing the sums more often.
constexpr int kBlockColumns = 192;

/// Vectors of a lane block: with R rows they fill the registers.
constexpr int kMaxVectors = kRegisters == 32 ? 4 : 2;
template <int NV>
constexpr int kRows = kRegisters == 32 ? (NV == 4 ? 6 : NV == 3 ? 8 : NV == 2 ? 12 : 16) : NV == 2 ? 6 : 10;

/// The first operand of a product, [r][k]: at one distance from row to row, and from number to number.
template <class T> struct Strided {
  const T* data;
  int64_t row, step;
  SPLAT_INLINE const T& operator()(int r, int k) const { return data[r * row + k * step]; }
};

template <class T> SPLAT_INLINE void multiply_add(Vec<T>& sum, T x, Vec<T> lane) { sum += x * lane; }
#ifdef SPLAT_PAIRS
/// Two bfloat16 each: both products are added, in float.
SPLAT_INLINE void multiply_add(Vec<float>& sum, const uint32_t& x, Vec<uint32_t> lane) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(lane), "m"(x));
}
#endif

/// C[r][lane] (+)= sum_k a(r, k) * b[k][lane], in R rows and NV vectors; see(v, sum) may change each. kN: what n always
/// is, so that the processor learns where this loop ends; 0: it varies.
template <class T, int R, int NV, bool kAdd, int kN = 0, class A, class B, class See>
SPLAT_INLINE void product(const A& a, const B* b, int64_t b_row, int n, T* c, int64_t c_row, See&& see) {
  constexpr int W = kWidth<T>;
  Vec<T> sum[R][NV];
  SPLAT_UNROLL
  for (int r = 0; r < R; ++r) {
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) sum[r][v] = kAdd ? load(c + r * c_row + v * W) : Vec<T>{};
  }
  if (kN > 0) n = kN;
  SPLAT_UNROLL2
  for (int k = 0; k < n; ++k) {
    Vec<B> lane[NV];
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) lane[v] = load(b + k * b_row + v * W);
    SPLAT_UNROLL
    for (int r = 0; r < R; ++r) {
      const B& x = a(r, k);
      SPLAT_UNROLL
      for (int v = 0; v < NV; ++v) multiply_add(sum[r][v], x, lane[v]);
    }
  }
  SPLAT_UNROLL
  for (int r = 0; r < R; ++r) {
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) {
      see(v, sum[r][v]);
      store(c + r * c_row + v * W, sum[r][v]);
    }
  }
}
template <class T, int R, int NV, bool kAdd, int kN = 0, class A, class B>
SPLAT_INLINE void product(const A& a, const B* b, int64_t b_row, int n, T* c, int64_t c_row) {
  product<T, R, NV, kAdd, kN>(a, b, b_row, n, c, c_row, [](int, Vec<T>) SPLAT_INLINED {});
}

/// Calls body(constant<rows>, first) for `n` rows: as many at a time as fill the registers, then four, then one.
template <int R, class Body> SPLAT_INLINE void in_rows(int n, Body&& body) {
  int r = 0;
  for (; r + R <= n; r += R) body(Constant<R>{}, r);
  if constexpr (R > 4)
    for (; r + 4 <= n; r += 4) body(Constant<4>{}, r);
  for (; r < n; ++r) body(Constant<1>{}, r);
}

/// Rows of D elements each; made(v, score) may change each vector of scores. Before each few rows, and after them,
/// before(r, rows) and after(r, rows) are called.
template <class T, int D, int NV, class B, class Made, class Before, class After>
SPLAT_INLINE void scores(const B* walked, const B* lanes, int n, T* out, Made&& made, Before&& before, After&& after) {
  in_rows<kRows<NV>>(n, [&](auto rows, int r) SPLAT_INLINED {
    before(r, rows);
    product<T, rows, NV, false>(Strided<B>{walked + r * D, D, 1}, lanes, kLanes, D, out + r * kLanes, kLanes, made);
    after(r, rows);
  });
}

template <class T, int D, int NV, class B>
SPLAT_INLINE void scores(const B* walked, const B* lanes, int n, T* out) {
  auto nothing = [](int, int) SPLAT_INLINED {};
  scores<T, D, NV>(walked, lanes, n, out, [](int, Vec<T>&) SPLAT_INLINED {}, nothing, nothing);
}

struct Nothing {
  SPLAT_INLINE void operator()() const {}
};

/// D columns; `step` elements from one walked row to the next. Before each few columns before() is called.
template <class T, int D, int NV, int kN = 0, class B, class Before = Nothing>
SPLAT_INLINE void accumulate(const B* walked, int64_t step, const B* p, int n, T* out, Before&& before = {}) {
  constexpr int R = kRows<NV>, rest = D % R;
  int d = 0;
  for (; d + R <= D; d += R) {
    before();
    product<T, R, NV, true, kN>(Strided<B>{walked + d, 1, step}, p, kLanes, n, out + d * kLanes, kLanes);
  }
  if constexpr (rest > 0)
    product<T, rest, NV, true, kN>(Strided<B>{walked + d, 1, step}, p, kLanes, n, out + d * kLanes, kLanes);
}

/// D is a multiple of the vectors' width.
template <class T, int D>
SPLAT_INLINE void spread(const T* p, int n, int lanes, const T* rows, T* out, int64_t out_row) {
  constexpr int W = kWidth<T>, NV = kMaxVectors, whole = D / (NV * W) * (NV * W), rest = (D - whole) / W;
  auto columns = [&](auto vectors, int d) SPLAT_INLINED {
    in_rows<kRows<vectors>>(n, [&](auto some, int k) SPLAT_INLINED {
      product<T, some, vectors, true>(Strided<T>{p + k * kLanes, kLanes, 1}, rows + d, D, lanes, out + k * out_row + d,
                                      out_row);
    });
  };
  for (int d = 0; d < whole; d += NV * W) columns(Constant<NV>{}, d);
  if constexpr (rest > 0) columns(Constant<rest>{}, whole);
}

}  // namespace splat
