// Attention: out = softmax(scale * Q K^T) V over the pairs of the plan, and the rows' log-sum-exp.
#pragma once
#include "splat/operands.hpp"
#include "splat/run.hpp"
#ifdef SPLAT_AMX
#include "splat/forward_amx.hpp"
#endif

namespace splat {

/// Queries in the lanes, keys walked; online softmax whose maximum is only raised when it must be.
template <class Facts> struct Forward {
  using Scalar = typename Facts::Scalar;
  using T = Compute<Scalar>;
  using Side = Operands<Facts>;
  using Element = typename Side::Element;
  template <int rows> using Keys = typename Side::template Memory<rows, true, false>;
  template <int rows> using Values = typename Side::template Memory<rows, false, true>;
  static constexpr int D = Facts::head_dim, W = kWidth<T>, kVectors = kMaxVectors, kDepth = Side::kDepth;
  static constexpr int kRowBytes = Keys<1>::kRowBytes + Values<1>::kRowBytes;
  static constexpr bool kKeysInLanes = false, kGuard = Facts::guard, kFill = Facts::fill, kOwnSegments = false;
  static constexpr bool kCopiesAhead = Side::kCopiesAhead, kKeeps = false, kWholeHeads = false;
  static constexpr int kTiles = kTilesOf<(kDepth + D) * kLanes * (int)sizeof(T)>, kChunk = kChunkOf<kRowBytes>;
  static constexpr int kRing = kRingOf<kRowBytes>;
  static constexpr Array Call::*kInLanes[] = {&Call::query}, Call::*kWalked[] = {&Call::key, &Call::value};

  struct State {
    alignas(64) Element query[kDepth * kLanes];        // [d][lane]
    alignas(64) T sum[D * kLanes];                     // [d][lane], not divided by `total` yet
    alignas(64) T most[kLanes], total[kLanes];         // base 2
    Place<Facts> place;
  };
  struct Scratch {
    State tiles[kTiles];
    Keys<kRing> key;
    Values<kRing> value;
    alignas(64) T p[kBlockColumns * kLanes];
  };

  const Call& call;
  Scratch& memory;
  const bool first;  // of the passes
  int64_t batch, kv_head, q_head;
  const Element *key, *value;  // of walked rows, for scores and for sums
  WalkedRows walked;
  Ahead ahead;
  struct {
    Ring* ring;
    int64_t row, step;
    int count;
  } coming = {};  // walked rows that can be copied

  void start(int64_t batch_, int64_t kv_head_, int64_t q_head_) {
    batch = batch_, kv_head = kv_head_, q_head = q_head_;
  }
  int walked_heads() const { return 1; }
  bool in_place(int64_t step) const {
    return Side::in_place(call.key, step) && Side::in_place(call.value, step);
  }

  void begin(int tile, int head, const LaneRows& rows) {
    State& s = memory.tiles[tile];
    Side::lanes(call.query, batch, q_head + head, rows, (T)lane_factor<Facts>(call), s.query);
    s.place.set(q_head + head, rows);
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
    walked = {from, step};
    key = Side::bring(call.key, batch, kv_head, from, step, count, place, fresh, memory.key).rows;
    value = Side::bring(call.value, batch, kv_head, from, step, count, place, fresh, memory.value).sums;
  }

  void copy_ahead(Ring* ring, int64_t row, int64_t step, int count) { coming = {ring, row, step, count}; }

  template <int NV, class M>
  __attribute__((noinline)) void block(int tile, int lane, int from, int n, int x, const M& mask) {
    State& s = memory.tiles[tile];
    T* const p = memory.p + lane;
    T *const sum = s.sum + lane, *const at_most = s.most + lane, *const at_total = s.total + lane;
    Vec<T> most[NV];
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) most[v] = splat_of(-kInfinity<T>);
    const T factor = (T)lane_factor<Facts>(call);
    const Interval full = mask.full(x, n);
    Vec<T> before[NV];
    auto made = [&](int v, Vec<T>& score) SPLAT_INLINED {
      score = Side::scaled(score, factor);
      if constexpr (!kChanges) most[v] = larger<T>(most[v], score);
    };
    auto begin = [&](int, int) SPLAT_INLINED {
      meanwhile();
      SPLAT_UNROLL
      for (int v = 0; v < NV; ++v) before[v] = most[v];
    };
    auto end = [&](int r, int rows) SPLAT_INLINED {
      const bool inside = r >= full.from && r + rows <= full.to;
      if (inside && !kChanges) return;
      SPLAT_UNROLL
      for (int v = 0; v < NV; ++v) most[v] = before[v];
      for (int k = r; k < r + rows; ++k) {
        SPLAT_UNROLL
        for (int v = 0; v < NV; ++v) {
          Vec<T> score = load(p + k * kLanes + v * W);
          if constexpr (Facts::modified) {
            const int at_lane = lane + v * W;
            const auto at = score_place<Facts, false>(call, batch, s.place.head, s.place, at_lane, walked, from + k);
            score = mod::real_vector<T>(Facts::Mod::template value<T>(score, at)) * (T)after_modification<Facts>(call);
          }
          if constexpr (Facts::soft_cap) score = capped<Facts>(call, score, tanh<T>(score));
          if constexpr (M::kSome)
            if (!inside) score = mask.keep(x + k, lane + v * W) ? score : splat_of(-kInfinity<T>);
          store(p + k * kLanes + v * W, score);
          most[v] = larger<T>(score, most[v]);
        }
      }
    };
    scores<T, kDepth, NV>(key + (int64_t)from * kDepth, s.query + lane, n, p, made, begin, end);
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
      base[v] = base[v] == -kInfinity<T> ? Vec<T>{} : base[v];  // a lane without any column yet
    }
    const Element* const weights = Side::template weights<NV>(p, n, [&](int k, int v) SPLAT_INLINED {
      const Vec<T> weight = exp2<T, kPaired<Facts>>(load(p + k * kLanes + v * W) - base[v]);
      total[v] += weight;
      return weight;
    });
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) store(at_total + v * W, total[v]);
    const Element* const rows = value + (int64_t)from * D;
    auto before_sums = [&]() SPLAT_INLINED { meanwhile(); };
    if (M::kSome && n == kGroup) Side::template sum<NV, kGroup>(rows, weights, n, sum, before_sums);  // edges of bands
    else Side::template sum<NV>(rows, weights, n, sum, before_sums);
  }

  void end(int tile, int head, const LaneRows& rows) {
    State& s = memory.tiles[tile];
    alignas(64) T factor[kLanes];
    finish_softmax(s.most, s.total, rows, factor, at<T>(call.lse, batch, q_head + head), call.lse.position);
    lanes_to_rows<Scalar, D>(s.sum, factor, rows, at<Scalar>(call.out, batch, q_head + head), call.out.position,
                             is_past_caches<Scalar, D>(call.out, call.batch, call.q_len, call.num_q_heads));
  }

  static void prepare(const Call& call, Pool& pool) { fill_outputs<Facts>(call, pool); }

 private:
  /// Whether scores are other numbers than products.
  static constexpr bool kChanges = Facts::soft_cap || Facts::modified;

  /// Rows asked for between two products: as many as eight lines. A processor waits for little more than a dozen lines
  /// at once, and products need some of them.
  static constexpr int kRowBytesAhead = D * (int)sizeof(Scalar), kRowsAhead = within(1, 512 / kRowBytesAhead, 8);

  /// A little of what the next unit needs, done between two products: walked rows are asked for first, and copied when
  /// all of them are on their way.
  __attribute__((noinline)) void meanwhile() {
    for (int n = 0; n < kRowsAhead; ++n)
      if (!ahead.next<kRowBytesAhead>() && kCopiesAhead) copy_row();
  }
  SPLAT_INLINE void copy_row() {
    if (!coming.count) return;
    const int place = coming.ring->place(coming.ring->to);
    if constexpr (kCopiesAhead) {
      Side::copy_row(call.key, batch, kv_head, coming.row, place, memory.key);
      Side::copy_row(call.value, batch, kv_head, coming.row, place, memory.value);
    }
    coming.ring->grow(1), coming.row += coming.step, --coming.count;
  }

  /// Scores may pass the maximum by so much (in powers of 2) before it is raised.
  static constexpr T kSlack = 8;

  /// Makes the new maximum the base; what was summed is scaled down to it.
  template <int NV> void raise(State& s, int lane, const Vec<T> (&most)[NV], Vec<T> (&base)[NV]) {
    Vec<T> factor[NV];
    bool scales = false;  // some sum that is not 0
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vec<T> next = larger<T>(base[v], most[v]);
      scales |= any<T>((next != base[v]) & (base[v] != -kInfinity<T>));
      factor[v] = next == base[v] ? splat_of((T)1) : exp2<T>(base[v] - next);
      base[v] = next;
      store(s.most + lane + v * W, next);
      store(s.total + lane + v * W, load(s.total + lane + v * W) * factor[v]);
    }
    if (!scales) return;
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
