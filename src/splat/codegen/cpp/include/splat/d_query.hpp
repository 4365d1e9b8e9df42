// dQ = scale * dS K with dS = P * (dO V^T - delta), over the pairs of the plan.
#pragma once
#include "splat/gradient.hpp"
#ifdef SPLAT_AMX
#include "splat/gradient_amx.hpp"
#endif

namespace splat {

/// Queries in the lanes, keys walked.
template <class Facts> struct DQuery {
  using Scalar = typename Facts::Scalar;
  using T = Compute<Scalar>;
  using Side = Operands<Facts>;
  using Element = typename Side::Element;
  template <int rows> using Keys = typename Side::template Memory<rows, true, true>;
  template <int rows> using Values = typename Side::template Memory<rows, true, false>;
  static constexpr int D = Facts::head_dim, W = kWidth<T>, kVectors = kMaxVectors, kDepth = Side::kDepth;
  static constexpr bool kKeysInLanes = false, kGuard = Facts::guard, kFill = Facts::fill, kOwnSegments = false;
  static constexpr int kRing = 0;
  static constexpr bool kCopiesAhead = false, kKeeps = false, kWholeHeads = false;
  static constexpr int kTiles = kTilesOf<(2 * kDepth + D) * kLanes * (int)sizeof(T)>;
  static constexpr int kChunk = kChunkOf<Keys<1>::kRowBytes + Values<1>::kRowBytes>;

  struct State {
    alignas(64) Element query[kDepth * kLanes], d_out[kDepth * kLanes];  // [d][lane]
    alignas(64) T sum[D * kLanes];                                       // [d][lane]
    alignas(64) T base[kLanes], delta[kLanes];
    Place<Facts> place;
  };
  struct Scratch {
    State tiles[kTiles];
    Keys<kChunk> key;
    Values<kChunk> value;
    alignas(64) T p[kBlockColumns * kLanes], ds[kBlockColumns * kLanes];
  };

  const Call& call;
  Scratch& memory;
  const bool first;
  int64_t batch, kv_head, q_head;
  Walked<Element> key, value;
  WalkedRows walked;

  void start(int64_t batch_, int64_t kv_head_, int64_t q_head_) {
    batch = batch_, kv_head = kv_head_, q_head = q_head_;
  }
  int walked_heads() const { return 1; }
  bool in_place(int64_t step) const {
    return Side::in_place(call.key, step) && Side::in_place(call.value, step);
  }

  void begin(int tile, int head, const LaneRows& rows) {
    State& s = memory.tiles[tile];
    const int64_t h = q_head + head;
    Side::lanes(call.query, batch, h, rows, (T)lane_factor<Facts>(call), s.query);
    Side::lanes(call.d_out, batch, h, rows, (T)1, s.d_out);
    s.place.set(h, rows);
    query_numbers<Scalar, D>(call, batch, h, kLanes, [&](int lane) { return rows.at[lane]; }, s.base, s.delta);
    if (first) memset(s.sum, 0, sizeof s.sum);
    else
      rows_to_lanes<Scalar, D>(at<Scalar>(call.d_query, batch, h), call.d_query.position, rows,
                               call.scale ? (T)(1 / call.scale) : (T)0, s.sum);
  }

  void pack(int, int64_t from, int64_t step, int count, int, int) {
    walked = {from, step};
    key = Side::bring(call.key, batch, kv_head, from, step, count, 0, count, memory.key);
    value = Side::bring(call.value, batch, kv_head, from, step, count, 0, count, memory.value);
  }

  template <int NV, class M>
  __attribute__((noinline)) void block(int tile, int lane, int from, int n, int x, const M& mask) {
    State& s = memory.tiles[tile];
    T *const p = memory.p + lane, *const ds = memory.ds + lane;
    Vec<T> base[NV], delta[NV];
    scores<T, kDepth, NV>(key.rows + (int64_t)from * kDepth, s.query + lane, n, p);
    scores<T, kDepth, NV>(value.rows + (int64_t)from * kDepth, s.d_out + lane, n, ds);
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) base[v] = load(s.base + lane + v * W), delta[v] = load(s.delta + lane + v * W);
    differentiate<Facts, NV, false>(
        call, n, x, lane, mask, p, ds, [&](int, int v) { return base[v]; }, [&](int, int v) { return delta[v]; },
        [&](int k, int v) {
          return score_place<Facts, false>(call, batch, s.place.head, s.place, lane + v * W, walked, from + k);
        });
    Side::template sum<NV>(key.sums + (int64_t)from * D, Side::template weights<NV>(ds, n), n, s.sum + lane);
  }

  void end(int tile, int head, const LaneRows& rows) {
    alignas(64) T factor[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) factor[lane] = (T)call.scale;
    lanes_to_rows<Scalar, D>(memory.tiles[tile].sum, factor, rows, at<Scalar>(call.d_query, batch, q_head + head),
                             call.d_query.position,
                             is_past_caches<Scalar, D>(call.d_query, call.batch, call.q_len, call.num_q_heads));
  }

  static void prepare(const Call& call, Pool& pool) { fill_query_gradients<Facts>(call, pool); }
};

template <class Facts, class... Passes> void d_query(const Call& call, Pool& pool) {
#ifdef SPLAT_AMX
  if constexpr (Facts::amx) run<GradientAmx<Facts, false>, Passes...>(call, pool);
  else
#endif
    run<DQuery<Facts>, Passes...>(call, pool);
}

}  // namespace splat
