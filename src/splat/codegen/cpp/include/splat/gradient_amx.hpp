// Gradients in bfloat16 on matrix tiles: what d_query.hpp and d_key_value.hpp compute, 32 lanes by 32 walked rows at a
// time.
//
//     lanes hold         queries: Q, dO                        keys: K, V
//     walked             keys: K, V                            queries: Q, dO
//     scores             S = Q K^T                             S^T = K Q^T
//     slopes             dP = dO V^T                           dP^T = V dO^T
//     sums               dQ += dS K                            dK += dS^T Q, dV += P^T dO
//
// with P = 2^(S - base) and dS = P * (dP - delta). Lanes lie in the rows of all products, as they are; the walked rows
// are brought together once for all tiles of a unit: transposed for scores and slopes, paired for the sums. Products
// of the next 32 walked rows are put between the exponentials of these.
#pragma once
#include "splat/amx.hpp"
#include "splat/gradient.hpp"

namespace splat {

template <class Facts, bool keys_in_lanes> struct GradientAmx {
  using Scalar = bfloat16;
  using T = float;
  using V = Vec<float>;
  static constexpr int D = Facts::head_dim, Dp = (D + 31) / 32 * 32;
  static constexpr bool kKeysInLanes = keys_in_lanes, kGuard = Facts::guard, kFill = Facts::fill, kOwnSegments = true;
  static constexpr int kRing = kRingOf<(2 + (keys_in_lanes ? 2 : 1)) * 2 * Dp>;
  static constexpr bool kCopiesAhead = false, kKeeps = false, kWholeHeads = false;
  static constexpr int kVectors = kMaxVectors, kSums = kKeysInLanes ? 2 : 1;
  static constexpr int kTiles = within(1, (768 << 10) / ((2 * 2 + 4 * kSums) * Dp * kLanes), 16);
  static constexpr int kChunk = kChunkOf<(2 + kSums) * 2 * Dp>;
  static constexpr Array Call::*kInLanes[] = {keys_in_lanes ? &Call::key : &Call::query,
                                              keys_in_lanes ? &Call::value : &Call::d_out};
  static constexpr Array Call::*kWalked[] = {keys_in_lanes ? &Call::query : &Call::key,
                                             keys_in_lanes ? &Call::d_out : &Call::value};
  static constexpr int kRowsAhead = 8;  // asked for with each chunk: a row tile's four times 64 in some thirty of them
  static constexpr int kBatch = 8;  // chunks of 32 walked rows whose sums are made at once

  struct State {
    alignas(64) bfloat16 first[kLanes * Dp], second[kLanes * Dp];  // Q and dO, or K and V
    alignas(64) float sums[kSums][kLanes * Dp];                    // [lane][d]: dQ; dK and dV
    alignas(64) float base[kLanes], delta[kLanes];                 // of queries in the lanes
  };
  struct Scratch {
    State tiles[kTiles];
    // B tiles of what is walked, `first` being K or Q and `second` V or dO.
    alignas(64) char first[kRing / 32 * kColumnBytes<Dp>], second[kRing / 32 * kColumnBytes<Dp>];
    alignas(64) char pairs[kSums][kRing / 32 * kPairBytes<Dp>];
    alignas(64) float base[kRing], delta[kRing];  // of queries that are walked
    bool finite[kRing / 32];                      // whether all that is paired of a chunk is
    alignas(64) bfloat16 rows[32 * Dp];
    alignas(64) char scores[2][4 * kTileBytes], slopes[2][4 * kTileBytes];  // C tiles
    // A tiles of dS, and of P, and what they are multiplied by where that is not all finite.
    alignas(64) char weights[kSums][kBatch][2 * kTileBytes];
    alignas(64) char clean[kSums][kBatch][kPairBytes<Dp>];
  };

  const Call& call;
  Scratch& memory;
  const bool is_first_pass;
  int64_t batch, kv_head, q_head;
  bool finite;
  float scale;  // of the products, to scores base 2 (or to tanh's argument)
  int place;    // of the present chunks in the memory
  Tiles config;
  Ahead ahead;

  void start(int64_t batch_, int64_t kv_head_, int64_t q_head_) {
    batch = batch_, kv_head = kv_head_, q_head = q_head_, scale = (float)lane_factor<Facts>(call);
    if (kKeysInLanes) q_head = kv_head * (call.num_q_heads / call.num_kv_heads);
  }
  int walked_heads() const { return kKeysInLanes ? (int)(call.num_q_heads / call.num_kv_heads) : 1; }
  bool in_place(int64_t) const { return false; }

  void begin(int tile, int head, const LaneRows& rows) {
    State& s = memory.tiles[tile];
    const int64_t h = kKeysInLanes ? kv_head : q_head + head;
    const Array &first = call.*kInLanes[0], &second = call.*kInLanes[1];
    pack_lanes<D, Dp>(at<Scalar>(first, batch, h), first.position, rows, s.first);
    pack_lanes<D, Dp>(at<Scalar>(second, batch, h), second.position, rows, s.second);
    if constexpr (!kKeysInLanes)
      query_numbers<Scalar, D>(call, batch, h, kLanes, [&](int lane) { return rows.at[lane]; }, s.base, s.delta);
    for (int n = 0; n < kSums; ++n) take_sums(result(n), h, rows, factor(n), s.sums[n]);
  }

  void pack(int head, int64_t from, int64_t step, int count, int place_, int fresh) {
    const int64_t h = kKeysInLanes ? q_head + head : kv_head;
    place = place_;
    for (int n = count - fresh; n < count; n += 32) {
      const int chunk = (place + n) / 32;
      if constexpr (kKeysInLanes)
        query_numbers<Scalar, D>(
            call, batch, h, 32, [&](int k) { return n + k < count ? from + step * (n + k) : -1; },
            memory.base + place + n, memory.delta + place + n);
      auto bring = [&](const Array& array, char* columns, char* pairs) {
        Rows here = chunk_rows<D, Dp>(array, batch, h, from + step * n, step, count - n, memory.rows);
        if constexpr (kKeysInLanes) here = with_base<Dp>(here, memory.base + place + n, memory.rows);
        rows_to_columns<Dp>(here, columns + chunk * kColumnBytes<Dp>);
        return !pairs || pair_rows<Dp>(here, pairs + chunk * kPairBytes<Dp>);
      };
      memory.finite[chunk] = bring(call.*kWalked[0], memory.first, memory.pairs[0]);
      memory.finite[chunk] &= bring(call.*kWalked[1], memory.second, kKeysInLanes ? memory.pairs[kSums - 1] : nullptr);
    }
    finite = all_of(memory.finite, place, count);
  }

  template <bool kEdges, class M>
  void tile(int index, const Span* const (&spans)[kGroups], int from, int to, const M& mask) {
    for (int lane = 0; lane < kLanes; lane += kPart) {
      const Part<M> part(mask, spans, lane, from, to);
      if (part.begin < part.end) chunks<kEdges>(memory.tiles[index], part);
    }
  }

  void end(int tile, int head, const LaneRows& rows) {
    for (int n = 0; n < kSums; ++n) {
      alignas(64) float factors[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) factors[lane] = factor(n);
      const Array& to = result(n);
      const int64_t length = kKeysInLanes ? call.kv_len : call.q_len;
      const int64_t heads = kKeysInLanes ? call.num_kv_heads : call.num_q_heads;
      put_lanes<D, Dp>(memory.tiles[tile].sums[n], factors, rows,
                       at<Scalar>(to, batch, kKeysInLanes ? kv_head : q_head + head), to.position,
                       is_past_caches<Scalar, D>(to, call.batch, length, heads));
    }
  }

 private:
  /// Gradient n, and what its sums are multiplied by.
  const Array& result(int n) const { return !kKeysInLanes ? call.d_query : n ? call.d_value : call.d_key; }
  float factor(int n) const { return n ? 1.f : (float)call.scale; }

  /// What earlier passes have added up.
  void take_sums(const Array& from, int64_t head, const LaneRows& rows, float factor, float* sums) const {
    if (is_first_pass || factor == 0) {
      memset(sums, 0, kLanes * Dp * sizeof *sums);
      return;
    }
    take_lanes<D, Dp>(at<Scalar>(from, batch, head), from.position, rows, sums);
    for (int n = 0; n < kLanes * Dp; n += kWidth<T>) store(sums + n, load(sums + n) / factor);
  }

  /// Of the scores and slopes of a chunk, one after the other.
  static constexpr int kProducts = 8 * (Dp / 32);
  SPLAT_INLINE void product(const State& s, int lane, int chunk, int n) {
    const int64_t columns = (place / 32 + chunk) * kColumnBytes<Dp>;
    if (n < kProducts / 2) score_step<Dp>(s.first + lane * Dp, memory.first + columns, memory.scores[chunk & 1], n);
    else
      score_step<Dp>(s.second + lane * Dp, memory.second + columns, memory.slopes[chunk & 1], n - kProducts / 2);
  }

  /// dS, and P, of 32 walked rows and one lane.
  template <bool kMasked, bool kEdges, class M>
  SPLAT_INLINE void row(const State& s, const Part<M>& part, int chunk, int slot, int row) {
    V weight[2], slope[2];
    SPLAT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int walked = chunk * 32 + half * 16;
      const V base = kKeysInLanes ? load(memory.base + place + walked) : splat_of(s.base[part.lane + row]);
      const V delta = kKeysInLanes ? load(memory.delta + place + walked) : splat_of(s.delta[part.lane + row]);
      V score = score_row(memory.scores[chunk & 1], row, half) * scale;
      slope[half] = score_row(memory.slopes[chunk & 1], row, half) - delta;
      if constexpr (Facts::soft_cap) {
        const V t = tanh<T>(score);
        score = t * (T)(call.soft_cap * kLog2e<double>);
        slope[half] *= 1.f - t * t;
      }
      weight[half] = probability<T, true>(score - base);
      slope[half] *= weight[half];
      if constexpr (kMasked) {
        const Vec<int32_t> keep = part.template keep<kEdges>(part.from + walked, row);
        weight[half] = keep ? weight[half] : V{};
        slope[half] = keep ? slope[half] : V{};
      }
    }
    const int at = row / 16 * kTileBytes + row % 16 * 64;
    const Vec<uint32_t> slopes = paired(slope[0], slope[1]);
    memcpy(memory.weights[0][slot] + at, &slopes, sizeof slopes);
    if constexpr (kKeysInLanes) {
      const Vec<uint32_t> weights = paired(weight[0], weight[1]);
      memcpy(memory.weights[kSums - 1][slot] + at, &weights, sizeof weights);
    }
  }

  /// A chunk's dS and P, between the products of the next one, where it is `more`.
  template <bool kMasked, bool kEdges, class M>
  SPLAT_INLINE void rows(const State& s, const Part<M>& part, int chunk, int slot, bool more) {
    SPLAT_UNROLL_STEPS
    for (int n = 0; n < kProducts; ++n) {
      if (more) product(s, part.lane, chunk + 1, n);
      SPLAT_UNROLL
      for (int r = n * kPart / kProducts; r < (n + 1) * kPart / kProducts; ++r)
        row<kMasked, kEdges>(s, part, chunk, slot, r);
    }
  }

  template <bool kEdges, class M> __attribute__((noinline)) void chunks(State& s, const Part<M>& part) {
    SPLAT_UNROLL_STEPS
    for (int n = 0; n < kProducts; ++n) product(s, part.lane, part.begin, n);
    int first = part.begin;  // of a batch
    for (int chunk = part.begin; chunk < part.end; ++chunk) {
      const int slot = chunk - first;
      const bool more = chunk + 1 < part.end;
      for (int rows = 0; rows < kRowsAhead; ++rows) ahead.template next<D * (int)sizeof(Scalar)>();
      if (part.is_full(chunk)) rows<false, kEdges>(s, part, chunk, slot, more);
      else rows<true, kEdges>(s, part, chunk, slot, more);
      if (!finite)
        for (int n = 0; n < kSums; ++n)
          clean_pairs<Dp, kEdges>(part, part.from + 32 * chunk, memory.pairs[n] + (place / 32 + chunk) * kPairBytes<Dp>,
                                  memory.clean[n][slot]);
      if (more && slot + 1 < kBatch) continue;
      for (int n = 0; n < kSums; ++n) add(s.sums[n] + part.lane * Dp, n, first, slot + 1);
      first = chunk + 1;
    }
  }

  /// Adds the products of `count` chunks from `first` on to sums n.
  SPLAT_INLINE void add(float* sums, int n, int first, int count) {
    for (int d = 0; d < Dp; d += 32)
      for (int slot = 0; slot < count; ++slot) {
        const char* const pairs =
            finite ? memory.pairs[n] + (place / 32 + first + slot) * kPairBytes<Dp> : memory.clean[n][slot];
        const char* const values = pairs + d / 16 * kTileBytes;
        SPLAT_UNROLL
        for (int k = 0; k < 4; ++k)
          sum_step<Dp>(memory.weights[n][slot], values, sums + d, 4 * slot + k, 4 * count, false);
      }
  }

 public:
  static void prepare(const Call& call, Pool& pool) {
    if constexpr (kKeysInLanes) fill_key_gradients<Facts>(call, pool);
    else fill_query_gradients<Facts>(call, pool);
  }
};

}  // namespace splat
