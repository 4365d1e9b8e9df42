// What the kernels of the gradients share: from scores and dO V^T to probabilities and the derivative of scores.
#pragma once
#include "splat/operands.hpp"
#include "splat/run.hpp"

namespace splat {

/// Of a gradient, what no pass writes: rows that no tile has, and keys past their sequence's length.
template <class Facts> void fill_query_gradients(const Call& call, Pool& pool) {
  if (!Facts::fill) return;
  for_heads(pool, call.batch, call.num_q_heads, [&](int64_t b, int64_t h) {
    clear_rows<typename Facts::Scalar, Facts::head_dim>(call.d_query, b, h, 0, call.q_len);
  });
}
template <class Facts> void fill_key_gradients(const Call& call, Pool& pool) {
  bool all_written = !Facts::fill;
  for (int64_t b = 0; b < call.batch && call.kv_lengths; ++b) all_written &= call.kv_lengths[b] >= call.kv_len;
  if (all_written) return;
  for_heads(pool, call.batch, call.num_kv_heads, [&](int64_t b, int64_t h) {
    const int64_t from = Facts::fill ? 0 : call.kv_lengths[b];
    clear_rows<typename Facts::Scalar, Facts::head_dim>(call.d_key, b, h, from, call.kv_len);
    clear_rows<typename Facts::Scalar, Facts::head_dim>(call.d_value, b, h, from, call.kv_len);
  });
}

/// Of queries row(n), n < count (none where negative): the base of their weights 2^(score - base), infinite where they
/// have no keys, and what their dO V^T is diminished by: the sum of dO * O, less the log-sum-exp's own derivative.
template <class Scalar, int D, class Row>
SPLAT_INLINE void query_numbers(const Call& call, int64_t batch, int64_t head, int count, Row&& row,
                                Compute<Scalar>* base, Compute<Scalar>* delta) {
  using T = Compute<Scalar>;
  const T* const lse = at<T>(call.lse, batch, head);
  const T* const d_lse = call.d_lse.data ? at<T>(call.d_lse, batch, head) : nullptr;
  const Scalar *const out = at<Scalar>(call.out, batch, head), *const d_out = at<Scalar>(call.d_out, batch, head);
  for (int n = 0; n < count; ++n) {
    if (n + kSoon < count && row(n + kSoon) >= 0) {
      ask_for<Scalar, D>(out + row(n + kSoon) * call.out.position);
      ask_for<Scalar, D>(d_out + row(n + kSoon) * call.d_out.position);
    }
    const int64_t here = row(n);
    base[n] = kInfinity<T>, delta[n] = 0;
    if (here < 0) continue;
    if (const T own = lse[here * call.lse.position]; own != -kInfinity<T>) base[n] = own * kLog2e<T>;
    delta[n] = dot<Scalar, D>(d_out + here * call.d_out.position, out + here * call.out.position);
    if (d_lse) delta[n] -= d_lse[here * call.d_lse.position];
  }
}

/// A weight, 2^exponent. It is at most 1: of scores in the millions a rounding is more than 1.
template <class T, bool kShort = false> SPLAT_INLINE Vec<T> probability(Vec<T> exponent) {
  return exp2<T, kShort>(smaller<T>(Vec<T>{}, exponent));
}

/// For n rows: p = 2^(score - base) and ds = p * (ds - delta), 0 where masked. `base` and `delta` give the vector of a
/// row and a vector of lanes, and `place` what a score modification is told of them; `p` is written only where `kKeep`.
template <class Facts, int NV, bool kKeep, class T, class M, class Base, class Delta, class Where>
SPLAT_INLINE void differentiate(const Call& call, int n, int x, int lane, const M& mask, T* p, T* ds, Base&& base,
                                Delta&& delta, Where&& place) {
  constexpr int W = kWidth<T>;
  const T factor = (T)lane_factor<Facts>(call);
  for (int k = 0; k < n; ++k) {
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int at = k * kLanes + v * W;
      Vec<T> score = Operands<Facts>::scaled(load(p + at), factor), slope = load(ds + at) - delta(k, v);
      if constexpr (Facts::modified) {
        const auto made = Facts::Mod::template with_slope<T>(score, place(k, v));
        score = mod::real_vector<T>(made.value) * (T)after_modification<Facts>(call);
        slope *= mod::real_vector<T>(made.slope);
      }
      if constexpr (Facts::soft_cap) {
        const Vec<T> t = tanh<T>(score);
        score = capped<Facts>(call, score, t);
        slope *= (T)1 - t * t;
      }
      Vec<T> weight = probability<T, kPaired<Facts>>(score - base(k, v));
      slope *= weight;
      if constexpr (Facts::modified) {  // a score that is none may have become no number
        const Vec<Int<T>> none = base(k, v) == kInfinity<T>;
        weight = none ? Vec<T>{} : weight, slope = none ? Vec<T>{} : slope;
      }
      if constexpr (kKeep) store(p + at, weight);
      store(ds + at, slope);
    }
  }
  if constexpr (M::kSome) {
    const Interval full = mask.full(x, n);
    for (int k = full.from > 0 ? 0 : full.to; k < n; k = k + 1 == full.from ? full.to : k + 1) {
      SPLAT_UNROLL
      for (int v = 0; v < NV; ++v) {
        const int at = k * kLanes + v * W;
        const Vec<Int<T>> keep = mask.keep(x + k, lane + v * W);
        if constexpr (kKeep) store(p + at, keep ? load(p + at) : Vec<T>{});
        store(ds + at, keep ? load(ds + at) : Vec<T>{});
      }
    }
  }
}

}  // namespace splat
