// Attention: out = softmax(scale * Q K^T) V over the pairs of the plan, and the rows' log-sum-exp.
#pragma once
#include "splat/run.hpp"
#ifdef SPLAT_AMX
#include "splat/forward_amx.hpp"
#endif

namespace splat {

/// Queries in the lanes, keys walked; online softmax whose maximum is only raised when it must be.
template <class Facts> struct Forward {
  using Scalar = typename Facts::Scalar;
  using T = Compute<Scalar>;
  static constexpr int D = Facts::head_dim, W = kWidth<T>, kVectors = kMaxVectors;
  static constexpr bool kKeysInLanes = false, kGuard = Facts::guard, kFill = Facts::fill, kOwnSegments = false;
  static constexpr bool kKeeps = false, kWholeHeads = false;
  static constexpr int kTiles = kTilesOf<2 * D * kLanes * (int)sizeof(T)>, kChunk = kChunkOf<2 * D * (int)sizeof(T)>;
  static constexpr int kRing = kRingOf<2 * D * (int)sizeof(T)>;
  static constexpr Array Call::*kInLanes[] = {&Call::query}, Call::*kWalked[] = {&Call::key, &Call::value};

  struct State {
    alignas(64) T query[D * kLanes], sum[D * kLanes];  // [d][lane]; `sum` is not divided by `total` yet
    alignas(64) T most[kLanes], total[kLanes];         // base 2
  };
  struct Scratch {
    State tiles[kTiles];
    alignas(64) T key[kRing * D], value[kRing * D], p[kBlockColumns * kLanes];
  };

  const Call& call;
  Scratch& memory;
  const bool first;  // of the passes
  int64_t batch, kv_head, q_head;
  const T *key, *value;  // [walked rows][D]
  Ahead ahead;

  void start(int64_t batch_, int64_t kv_head_, int64_t q_head_) {
    batch = batch_, kv_head = kv_head_, q_head = q_head_;
  }
  int walked_heads() const { return 1; }
  bool in_place(int64_t step) const {
    return step == 1 && is_packed<Scalar, D>(call.key) && is_packed<Scalar, D>(call.value);
  }

  void begin(int tile, int head, const LaneRows& rows) {
    State& s = memory.tiles[tile];
    rows_to_lanes<Scalar, D>(at<Scalar>(call.query, batch, q_head + head), call.query.position, rows,
                             (T)lane_factor<Facts>(call), s.query);
    if (first) {
      memset(s.sum, 0, sizeof s.sum);
      for (int lane = 0; lane < kLanes; ++lane) s.most[lane] = -kInfinity<T>, s.total[lane] = 0;
      return;
    }
    rows_to_lanes<Scalar, D>(at<Scalar>(call.out, batch, q_head + head), call.out.position, rows, (T)1, s.sum);
    const T* lse = at<T>(call.lse, batch, q_head + head);
    for (int lane = 0; lane < kLanes; ++lane) {
      s.most[lane] = rows.at[lane] < 0 ? -kInfinity<T> : lse[rows.at[lane] * call.lse.position] * kLog2e<T>;
      s.total[lane] = s.most[lane] == -kInfinity<T> ? 0 : 1;
    }
  }

  void pack(int, int64_t from, int64_t step, int count, int place, int fresh) {
    key = walked_rows<Scalar, D>(call.key, batch, kv_head, from, step, count, fresh, memory.key + place * D);
    value = walked_rows<Scalar, D>(call.value, batch, kv_head, from, step, count, fresh, memory.value + place * D);
  }

  template <int NV, class M>
  __attribute__((noinline)) void block(int tile, int lane, int from, int n, int x, const M& mask) {
    State& s = memory.tiles[tile];
    T* const p = memory.p + lane;
    T *const sum = s.sum + lane, *const at_most = s.most + lane, *const at_total = s.total + lane;
    Vec<T> most[NV];
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) most[v] = splat_of(-kInfinity<T>);
    constexpr bool kPlain = !M::kSome && !Facts::soft_cap;
    scores<T, D, NV, kPlain>(key + (int64_t)from * D, s.query + lane, n, p, most, [&]() SPLAT_INLINED {
      for (int rows = 0; rows < kRowsAhead; ++rows) ahead.next<D * (int)sizeof(Scalar)>();
    });
    if constexpr (!kPlain)
      for (int k = 0; k < n; ++k) {
        SPLAT_UNROLL
        for (int v = 0; v < NV; ++v) {
          Vec<T> score = load(p + k * kLanes + v * W);
          if constexpr (Facts::soft_cap) score = tanh<T>(score) * (T)(call.soft_cap * kLog2e<double>);
          if constexpr (M::kSome) score = mask.keep(x + k, lane + v * W) ? score : splat_of(-kInfinity<T>);
          store(p + k * kLanes + v * W, score);
          most[v] = larger<T>(score, most[v]);
        }
      }
    bool rises = false;
    Vec<T> base[NV];
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) {
      base[v] = load(at_most + v * W);
      rises |= any_greater<T>(most[v], base[v] + kSlack);
    }
    if (rises) raise<NV>(s, lane, most, base);
    Vec<T> total[NV];
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) {
      total[v] = load(at_total + v * W);
      base[v] = larger<T>(base[v], splat_of((T)-1e30));  // finite: a lane without any column yet has -infinity
    }
    for (int k = 0; k < n; ++k) {
      SPLAT_UNROLL
      for (int v = 0; v < NV; ++v) {
        const Vec<T> weight = exp2<T>(load(p + k * kLanes + v * W) - base[v]);
        total[v] += weight;
        store(p + k * kLanes + v * W, weight);
      }
    }
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) store(at_total + v * W, total[v]);
    const T* const rows = value + (int64_t)from * D;
    if (M::kSome && n == kGroup) accumulate<T, D, NV, kGroup>(rows, p, n, sum);  // edges of bands
    else accumulate<T, D, NV>(rows, p, n, sum);
  }

  void end(int tile, int head, const LaneRows& rows) {
    State& s = memory.tiles[tile];
    alignas(64) T factor[kLanes];
    finish_softmax(s.most, s.total, rows, factor, at<T>(call.lse, batch, q_head + head), call.lse.position);
    lanes_to_rows<Scalar, D>(s.sum, factor, rows, at<Scalar>(call.out, batch, q_head + head), call.out.position,
                             is_past_caches<Scalar, D>(call.out, call.batch, call.q_len, call.num_q_heads));
  }

  static void prepare(const Call& call) { fill_outputs<Facts>(call); }

 private:
  /// Rows asked for between the products: a row tile's three times 64 in less than a hundred of them.
  static constexpr int kRowsAhead = 3;

  /// Scores may pass the maximum by so much (in powers of 2) before it is raised.
  static constexpr T kSlack = 8;

  /// Makes the new maximum the base; what was summed is scaled down to it.
  template <int NV> void raise(State& s, int lane, const Vec<T> (&most)[NV], Vec<T> (&base)[NV]) {
    Vec<T> factor[NV];
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<T> next = larger<T>(base[v], most[v]);
      factor[v] = next == base[v] ? splat_of((T)1) : exp2<T>(base[v] - next);
      base[v] = next;
      store(s.most + lane + v * W, next);
      store(s.total + lane + v * W, load(s.total + lane + v * W) * factor[v]);
    }
    for (int d = 0; d < D; ++d) {
      SPLAT_UNROLL
      for (int v = 0; v < NV; ++v) {
        T* sum = s.sum + d * kLanes + lane + v * W;
        store(sum, load(sum) * factor[v]);
      }
    }
  }
};

template <class Facts, class... Passes> void forward(const Call& call, Pool& pool) {
#ifdef SPLAT_AMX
  if constexpr (Facts::amx) run<ForwardAmx<Facts>, Passes...>(call, pool);
  else
#endif
    run<Forward<Facts>, Passes...>(call, pool);
}

}  // namespace splat
