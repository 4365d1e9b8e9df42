// dQ, dK and dV in one go: five matrix products where d_query.hpp and d_key_value.hpp take seven between them.
//
// Queries lie in the lanes, so that dQ adds up there; dK and dV add up in the rows of the keys that are walked, and
// belong to one thread, which goes through its head alone. For calls that have a head for every thread.
#pragma once
#include "splat/gradient.hpp"

namespace splat {

template <class Facts> struct Backward {
  using Scalar = typename Facts::Scalar;
  using T = Compute<Scalar>;
  static_assert(sizeof(Scalar) == sizeof(T), "dK and dV add up in the results");
  static constexpr int D = Facts::head_dim, W = kWidth<T>, Dp = (D + W - 1) / W * W, kVectors = kMaxVectors;
  static constexpr bool kKeysInLanes = false, kGuard = Facts::guard, kFill = Facts::fill, kOwnSegments = false;
  static constexpr int kRing = 0;
  static constexpr bool kCopiesAhead = false, kKeeps = true, kWholeHeads = true;
  static constexpr int kChunk = within(32, (96 << 10) / (2 * (D + Dp) * (int)sizeof(T)) / 32 * 32, 4096);
  static constexpr int kTiles = within(1, (640 << 10) / ((3 * D + 2 * Dp) * kLanes * (int)sizeof(T)), kMostTiles);
  static constexpr int kSlots = 14;

  /// Row tiles of a unit: as many as leave room in the second-level cache for all columns that they have, of `width`
  /// each, so that every row of K and V is read once, and of dK and dV written once. Where they are too many for that,
  /// each unit reads and writes them all, and has as many tiles as there may be.
  static int64_t tiles_for(int64_t width) {
    for (int64_t n = kTiles; n > 1; --n) {
      const int64_t slots = ceil_div(n * kLanes + width, kChunk) + 1;
      if (slots <= kSlots && n * (int64_t)sizeof(State) + slots * (int64_t)sizeof(Slot) <= 1400 << 10) return n;
    }
    return kTiles;
  }

  struct State {
    alignas(64) T query[D * kLanes], d_out[D * kLanes], sum[D * kLanes];  // [d][lane]
    alignas(64) T query_rows[kLanes * Dp], d_out_rows[kLanes * Dp];       // [lane][d], zeros in lanes without a row
    alignas(64) T base[kLanes], delta[kLanes];
    Place<Facts> place;
  };
  /// A chunk of walked rows, with what their gradients have added up to.
  struct Slot {
    int64_t from;  // its first row
    int count;     // 0: nothing
    alignas(64) T key[kChunk * D], value[kChunk * D], d_key[kChunk * Dp], d_value[kChunk * Dp];
  };
  struct Scratch {
    State tiles[kTiles];
    Slot slots[kSlots];
    alignas(64) T p[kBlockColumns * kLanes], ds[kBlockColumns * kLanes];
  };

  const Call& call;
  Scratch& memory;
  const bool first;
  int64_t batch, kv_head, q_head;
  const T *key, *value;
  WalkedRows walked;
  Slot* slot;             // the chunk that is worked on
  int64_t step, residue;  // of the lattice that the slots are of
  int64_t untouched;      // of dK and dV, the rows from here on hold nothing yet

  /// Before and after all units of a key head.
  void open(int64_t batch_, int64_t kv_head_) {
    batch = batch_, kv_head = kv_head_, untouched = first ? 0 : call.kv_len, step = 0;
    for (Slot& one : memory.slots) one.count = 0;
  }
  void close() {
    for (Slot& one : memory.slots) put_back(one);
    clear(call.kv_len);
  }

  void start(int64_t batch_, int64_t kv_head_, int64_t q_head_) {
    batch = batch_, kv_head = kv_head_, q_head = q_head_;
  }
  int walked_heads() const { return 1; }
  bool in_place(int64_t) const { return false; }

  void begin(int tile, int head, const LaneRows& rows) {
    State& s = memory.tiles[tile];
    const int64_t h = q_head + head;
    const Scalar *query = at<Scalar>(call.query, batch, h), *d_out = at<Scalar>(call.d_out, batch, h);
    query_numbers<Scalar, D>(call, batch, h, kLanes, [&](int lane) { return rows.at[lane]; }, s.base, s.delta);
    s.place.set(h, rows);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t row = rows.at[lane];
      if (lane + kSoon < kLanes && rows.at[lane + kSoon] >= 0)
        ask_for<Scalar, D>(query + rows.at[lane + kSoon] * call.query.position);
      T *const query_row = s.query_rows + lane * Dp, *const d_out_row = s.d_out_rows + lane * Dp;
      // A query without any key takes no part, whatever it holds.
      const bool here = s.base[lane] != kInfinity<T>;
      if (!here || Dp > D) memset(query_row, 0, Dp * sizeof(T)), memset(d_out_row, 0, Dp * sizeof(T));
      if (!here) continue;
      constexpr int whole = D / W * W;
      const T* const from = query + row * call.query.position;
      for (int d = 0; d < whole; d += W) store(query_row + d, load(from + d) * (T)call.scale);
      for (int d = whole; d < D; ++d) query_row[d] = from[d] * (T)call.scale;
      memcpy(d_out_row, d_out + row * call.d_out.position, D * sizeof(T));
    }
    LaneRows own;  // the copies, which lie together
    for (int lane = 0; lane < kLanes; ++lane) own.at[lane] = lane;
    rows_to_lanes<T, D>(s.query_rows, Dp, own, (T)lane_factor<Facts>(call, 1), s.query);
    rows_to_lanes<T, D>(s.d_out_rows, Dp, own, (T)1, s.d_out);
    if (first) memset(s.sum, 0, sizeof s.sum);
    else
      rows_to_lanes<Scalar, D>(at<Scalar>(call.d_query, batch, h), call.d_query.position, rows,
                               call.scale ? (T)(1 / call.scale) : (T)0, s.sum);
  }

  void pack(int, int64_t from, int64_t step_, int count, int, int) {
    walked = {from, step_};
    if (step != step_ || residue != from % step_) {  // rows may lie in slots of another lattice
      for (Slot& one : memory.slots) put_back(one);
      step = step_, residue = from % step;
    }
    slot = &memory.slots[from / step / kChunk % kSlots];
    key = slot->key, value = slot->value;
    if (slot->count && slot->from == from) return;
    put_back(*slot);
    slot->from = from, slot->count = count;
    pack_rows<Scalar, D>(at<Scalar>(call.key, batch, kv_head), call.key.position, from, step, count, slot->key);
    pack_rows<Scalar, D>(at<Scalar>(call.value, batch, kv_head), call.value.position, from, step, count, slot->value);
    clear(step == 1 ? from : from + step * (count - 1) + 1);
    const int64_t left = step == 1 ? untouched - from : count;
    const int touched = (int)(left < count ? left : count);
    const T *const d_key = at<T>(call.d_key, batch, kv_head), *const d_value = at<T>(call.d_value, batch, kv_head);
    for (int n = 0; n < touched; ++n) {
      memcpy(slot->d_key + n * Dp, d_key + (from + step * n) * call.d_key.position, D * sizeof(T));
      memcpy(slot->d_value + n * Dp, d_value + (from + step * n) * call.d_value.position, D * sizeof(T));
    }
    memset(slot->d_key + touched * Dp, 0, (size_t)(count - touched) * Dp * sizeof(T));
    memset(slot->d_value + touched * Dp, 0, (size_t)(count - touched) * Dp * sizeof(T));
    if (touched < count) untouched = from + count;
  }

  template <int NV, class M>
  __attribute__((noinline)) void block(int tile, int lane, int at, int n, int x, const M& mask) {
    State& s = memory.tiles[tile];
    T *const p = memory.p + lane, *const ds = memory.ds + lane;
    Vec<T> base[NV], delta[NV];
    scores<T, D, NV>(key + (int64_t)at * D, s.query + lane, n, p);
    scores<T, D, NV>(value + (int64_t)at * D, s.d_out + lane, n, ds);
    SPLAT_UNROLL
    for (int v = 0; v < NV; ++v) base[v] = load(s.base + lane + v * W), delta[v] = load(s.delta + lane + v * W);
    differentiate<Facts, NV, true>(
        call, n, x, lane, mask, p, ds, [&](int, int v) { return base[v]; }, [&](int, int v) { return delta[v]; },
        [&](int k, int v) {
          return score_place<Facts, false>(call, batch, s.place.head, s.place, lane + v * W, walked, at + k);
        });
    accumulate<T, D, NV>(key + (int64_t)at * D, D, ds, n, s.sum + lane);
    spread_rows(p, n, NV * W, s.d_out_rows + lane * Dp, slot->d_value + at * Dp);
    spread_rows(ds, n, NV * W, s.query_rows + lane * Dp, slot->d_key + at * Dp);
  }

  void end(int tile, int head, const LaneRows& rows) {
    alignas(64) T factor[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) factor[lane] = (T)call.scale;
    lanes_to_rows<Scalar, D>(memory.tiles[tile].sum, factor, rows, at<Scalar>(call.d_query, batch, q_head + head),
                             call.d_query.position,
                             is_past_caches<Scalar, D>(call.d_query, call.batch, call.q_len, call.num_q_heads));
  }

  static void prepare(const Call& call, Pool& pool) {
    if constexpr (kFill) fill_query_gradients<Facts>(call, pool), fill_key_gradients<Facts>(call, pool);
  }

 private:
  /// Writes a slot's gradients where they belong; it is empty then.
  void put_back(Slot& one) {
    const bool past_caches = is_past_caches<Scalar, D>(call.d_key, call.batch, call.kv_len, call.num_kv_heads) &&
                             is_past_caches<Scalar, D>(call.d_value, call.batch, call.kv_len, call.num_kv_heads);
    T *const d_key = at<T>(call.d_key, batch, kv_head), *const d_value = at<T>(call.d_value, batch, kv_head);
    for (int n = 0; n < one.count; ++n) {
      put_row<Scalar, D>(one.d_key + n * Dp, d_key + (one.from + step * n) * call.d_key.position, past_caches);
      put_row<Scalar, D>(one.d_value + n * Dp, d_value + (one.from + step * n) * call.d_value.position, past_caches);
    }
    one.count = 0;
  }
  /// Sets what is untouched before row `to` to 0.
  void clear(int64_t to) {
    T *const d_key = at<T>(call.d_key, batch, kv_head), *const d_value = at<T>(call.d_value, batch, kv_head);
    for (; untouched < to; ++untouched) {
      memset(d_key + untouched * call.d_key.position, 0, D * sizeof(T));
      memset(d_value + untouched * call.d_value.position, 0, D * sizeof(T));
    }
  }
  /// One text for all widths: they differ in a number only.
  static __attribute__((noinline)) void spread_rows(const T* p, int n, int lanes, const T* rows, T* out) {
    spread<T, Dp>(p, n, lanes, rows, out, Dp);
  }
};

template <class Facts, class... Passes> void backward(const Call& call, Pool& pool) {
  run<Backward<Facts>, Passes...>(call, pool);
}

}  // namespace splat
