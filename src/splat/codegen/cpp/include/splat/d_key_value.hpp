// dV = P^T dO and dK = scale * dS^T Q with dS = P * (dO V^T - delta), over the pairs of the plan's transposed matrix.
#pragma once
#include "splat/gradient.hpp"
#ifdef SPLAT_AMX
#include "splat/gradient_amx.hpp"
#endif

namespace splat {

/// Keys in the lanes, queries walked: of all the query heads that share the keys, one head after the other.
template <class Facts> struct DKeyValue {
  using Scalar = typename Facts::Scalar;
  using T = Compute<Scalar>;
  using Side = Operands<Facts>;
  using Element = typename Side::Element;
  template <int rows> using Queries = typename Side::template Memory<rows, true, true>;
  static constexpr int D = Facts::head_dim, W = kWidth<T>, kVectors = kMaxVectors, kDepth = Side::kDepth;
  static constexpr bool kKeysInLanes = true, kGuard = Facts::guard, kFill = Facts::fill, kOwnSegments = false;
  static constexpr int kRing = 0;
  static constexpr bool kCopiesAhead = false, kKeeps = false, kWholeHeads = false;
  static constexpr int kTiles = kTilesOf<2 * (kDepth + D) * kLanes * (int)sizeof(T)>;
  static constexpr int kChunk = kChunkOf<2 * Queries<1>::kRowBytes>;

  struct State {
    alignas(64) Element key[kDepth * kLanes], value[kDepth * kLanes];  // [d][lane]
    alignas(64) T d_key[D * kLanes], d_value[D * kLanes];              // [d][lane]
    Place<Facts> place;
  };
  struct Scratch {
    State tiles[kTiles];
    Queries<kChunk> query, d_out;
    alignas(64) T base[kChunk], delta[kChunk];
    alignas(64) T p[kBlockColumns * kLanes], ds[kBlockColumns * kLanes];
  };

  const Call& call;
  Scratch& memory;
  const bool first;
  int64_t batch, kv_head, q_head;
  Walked<Element> query, d_out;
  WalkedRows walked;
  int64_t walked_head;

  void start(int64_t batch_, int64_t kv_head_, int64_t) {
    batch = batch_, kv_head = kv_head_, q_head = kv_head_ * (call.num_q_heads / call.num_kv_heads);
  }
  int walked_heads() const { return (int)(call.num_q_heads / call.num_kv_heads); }
  bool in_place(int64_t) const { return false; }

  void begin(int tile, int, const LaneRows& rows) {
    State& s = memory.tiles[tile];
    Side::lanes(call.key, batch, kv_head, rows, (T)lane_factor<Facts>(call), s.key);
    Side::lanes(call.value, batch, kv_head, rows, (T)1, s.value);
    s.place.set(kv_head, rows);
    if (first) {
      memset(s.d_key, 0, sizeof s.d_key);
      memset(s.d_value, 0, sizeof s.d_value);
      return;
    }
    rows_to_lanes<Scalar, D>(at<Scalar>(call.d_key, batch, kv_head), call.d_key.position, rows,
                             call.scale ? (T)(1 / call.scale) : (T)0, s.d_key);
    rows_to_lanes<Scalar, D>(at<Scalar>(call.d_value, batch, kv_head), call.d_value.position, rows, (T)1, s.d_value);
  }

  void pack(int head, int64_t from, int64_t step, int count, int, int) {
    const int64_t h = q_head + head;
    walked = {from, step}, walked_head = h;
    query = Side::bring(call.query, batch, h, from, step, count, 0, count, memory.query);
    d_out = Side::bring(call.d_out, batch, h, from, step, count, 0, count, memory.d_out);
    query_numbers<Scalar, D>(
        call, batch, h, count, [&](int n) { return from + step * n; }, memory.base, memory.delta);
  }

  template <int NV, class M>
  __attribute__((noinline)) void block(int tile, int lane, int from, int n, int x, const M& mask) {
    State& s = memory.tiles[tile];
    T *const p = memory.p + lane, *const ds = memory.ds + lane;
    const T *base = memory.base + from, *delta = memory.delta + from;
    scores<T, kDepth, NV>(query.rows + (int64_t)from * kDepth, s.key + lane, n, p);
    scores<T, kDepth, NV>(d_out.rows + (int64_t)from * kDepth, s.value + lane, n, ds);
    differentiate<Facts, NV, true>(
        call, n, x, lane, mask, p, ds, [&](int k, int) { return splat_of(base[k]); },
        [&](int k, int) { return splat_of(delta[k]); },
        [&](int k, int v) {
          return score_place<Facts, true>(call, batch, walked_head, s.place, lane + v * W, walked, from + k);
        });
    const Element *const d_outs = d_out.sums + (int64_t)from * D, *const queries = query.sums + (int64_t)from * D;
    Side::template sum<NV>(d_outs, Side::template weights<NV>(p, n), n, s.d_value + lane);
    Side::template sum<NV>(queries, Side::template weights<NV>(ds, n), n, s.d_key + lane);
  }

  void end(int tile, int, const LaneRows& rows) {
    const State& s = memory.tiles[tile];
    alignas(64) T factor[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) factor[lane] = (T)call.scale;
    lanes_to_rows<Scalar, D>(s.d_key, factor, rows, at<Scalar>(call.d_key, batch, kv_head), call.d_key.position,
                             is_past_caches<Scalar, D>(call.d_key, call.batch, call.kv_len, call.num_kv_heads));
    for (int lane = 0; lane < kLanes; ++lane) factor[lane] = 1;
    lanes_to_rows<Scalar, D>(s.d_value, factor, rows, at<Scalar>(call.d_value, batch, kv_head), call.d_value.position,
                             is_past_caches<Scalar, D>(call.d_value, call.batch, call.kv_len, call.num_kv_heads));
  }

  static void prepare(const Call& call, Pool& pool) { fill_key_gradients<Facts>(call, pool); }
};

template <class Facts, class... Passes> void d_key_value(const Call& call, Pool& pool) {
#ifdef SPLAT_AMX
  if constexpr (Facts::amx) run<GradientAmx<Facts, true>, Passes...>(call, pool);
  else
#endif
    run<DKeyValue<Facts>, Passes...>(call, pool);
}

}  // namespace splat
