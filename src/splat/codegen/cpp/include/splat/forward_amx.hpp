// Attention in bfloat16 on matrix tiles: what forward.hpp computes, 32 queries by 32 keys at a time.
//
//     scores   S[query][key]  =  sum_d    Q[query][d] * K[key][d]      rows of Q as they are, keys transposed
//     output   O[query][d]   +=  sum_key  P[query][key] * V[key][d]    rows of P as they are, pairs of V's rows
//
// The exponentials take longer than the products, which are put between them: while the weights of one chunk of 32 keys
// are made, so are the scores of the next one, and a part of the output of some chunks before, 32 columns wide:
//
//     weights      P0       P1       P2        P3        P4        P5        P6        P7
//     scores       S1       S2       S3        S4        S5        S6        S7
//     output                         O[:, :32] O[:, 32:] O[:, :32] O[:, 32:] O[:, :32] O[:, 32:] ...      64 columns
//                                    +=  P0 V0 + P1 V1   +=  P2 V2 + P3 V3   +=  P4 V4 + P5 V5
//
// Weights are taken against a base that is set once, 2^40 above the largest score of a chunk, and hardly ever changes:
// a weight of 2 or more is seen in its bits, and the chunk's weights are made again with a larger base.
#pragma once
#include "splat/amx.hpp"
#include "splat/run.hpp"

namespace splat {

template <class Facts> struct ForwardAmx {
  using Scalar = bfloat16;
  using T = float;
  using V = Vec<float>;
  static constexpr int D = Facts::head_dim, Dp = (D + 31) / 32 * 32, kSteps = Dp / 32;
  static constexpr int kBatch = kSteps;  // chunks whose output is made at once: as many as it has parts
  static constexpr bool kKeysInLanes = false, kGuard = Facts::guard, kFill = Facts::fill, kOwnSegments = true;
  static constexpr int kRing = kRingOf<2 * 2 * Dp>;
  static constexpr Array Call::*kInLanes[] = {&Call::query}, Call::*kWalked[] = {&Call::key, &Call::value};
  static constexpr bool kCopiesAhead = false, kKeeps = false, kWholeHeads = false;
  static constexpr int kVectors = kMaxVectors;
  static constexpr int kTiles = within(1, (896 << 10) / ((4 + 2) * Dp * kLanes), 16);
  static constexpr int kChunk = kChunkOf<2 * 2 * Dp>;
  static constexpr float kHeadroom = 40, kHuge = 1 << 14;
  static constexpr int kRowsAhead = 8;  // asked for with each chunk: a row tile's three times 64 in some twenty of them

  /// Rows may have no column in their part's first chunk: they get their base in a later one.
  enum class Known { none, some, all };

  struct State {
    alignas(64) bfloat16 query[kLanes * Dp];
    alignas(64) float sum[kLanes * Dp];       // [lane][d]
    // Of weights, 16 parts that are still to be added up; `current` says which of two holds them.
    alignas(64) float total[2][kLanes * 16];
    alignas(64) float base[kLanes];  // weights are 2^(score - base)
    // Of each part of the lanes.
    Known known[kLanes / kPart];  // which of `base` are set
    bool summed[kLanes / kPart];  // whether `sum` is
    bool huge[kLanes / kPart];  // whether scores are so large that rounding them shows in the weights
    int current[kLanes / kPart];
  };
  struct Scratch {
    State tiles[kTiles];
    alignas(64) char key[kRing / 32 * kColumnBytes<Dp>];  // B tiles [chunk][step][first, second 16 keys]
    alignas(64) char value[kRing / 32 * kPairBytes<Dp>];  // B tiles [chunk][slice]
    bool finite[kRing / 32];                              // whether all of a chunk's values are
    alignas(64) bfloat16 rows[32 * Dp];
    alignas(64) char scores[2][4 * kTileBytes];           // C tiles [group][first, second 16 keys]
    alignas(64) char p[2 * kBatch][2 * kTileBytes];       // A tiles [group]
    alignas(64) char clean[2 * kBatch][kPairBytes<Dp>];
  };

  const Call& call;
  Scratch& memory;
  const bool first;
  int64_t batch, kv_head, q_head;
  bool finite;
  float scale;  // of the products, to scores base 2 (or to tanh's argument)
  const char *key, *value;
  Tiles config;
  Ahead ahead;

  void start(int64_t batch_, int64_t kv_head_, int64_t q_head_) {
    batch = batch_, kv_head = kv_head_, q_head = q_head_;
    scale = (float)lane_factor<Facts>(call);
  }
  int walked_heads() const { return 1; }
  bool in_place(int64_t) const { return false; }

  void begin(int tile, int head, const LaneRows& rows) {
    State& s = memory.tiles[tile];
    pack_lanes<D, Dp>(at<Scalar>(call.query, batch, q_head + head), call.query.position, rows, s.query);
    for (int part = 0; part < kLanes / kPart; ++part)
      s.known[part] = first ? Known::none : Known::all, s.summed[part] = !first, s.huge[part] = false,
      s.current[part] = 0;
    memset(s.total[0], 0, sizeof s.total[0]);
    for (int lane = 0; lane < kLanes; ++lane) s.base[lane] = -kInfinity<T>;
    if (first) return;
    take_lanes<D, Dp>(at<Scalar>(call.out, batch, q_head + head), call.out.position, rows, s.sum);
    const T* lse = at<T>(call.lse, batch, q_head + head);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t row = rows.at[lane];
      if (row < 0) continue;
      s.base[lane] = lse[row * call.lse.position] * kLog2e<T>;
      if (s.base[lane] == -kInfinity<T>) s.known[lane / kPart] = Known::some;
      s.total[0][lane * 16] = s.base[lane] == -kInfinity<T> ? 0 : 1;
    }
  }

  void pack(int, int64_t from, int64_t step, int count, int place, int fresh) {
    for (int n = count - fresh; n < count; n += 32) {
      const int chunk = (place + n) / 32;
      auto rows = [&](const Array& array) {
        return chunk_rows<D, Dp>(array, batch, kv_head, from + step * n, step, count - n, memory.rows);
      };
      rows_to_columns<Dp>(rows(call.key), memory.key + chunk * kColumnBytes<Dp>);
      memory.finite[chunk] = pair_rows<Dp>(rows(call.value), memory.value + chunk * kPairBytes<Dp>);
    }
    key = memory.key + place / 32 * kColumnBytes<Dp>, value = memory.value + place / 32 * kPairBytes<Dp>;
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
    State& s = memory.tiles[tile];
    alignas(64) T total[kLanes], factor[kLanes];
    for (int lane = 0; lane < kLanes; lane += 16) add_up(s.total[s.current[lane / kPart]] + lane * 16, total + lane);
    for (int part = 0; part < kLanes / kPart; ++part)
      if (!s.summed[part]) memset(s.sum + part * kPart * Dp, 0, kPart * Dp * sizeof(float));
    finish_softmax(s.base, total, rows, factor, at<T>(call.lse, batch, q_head + head), call.lse.position);
    put_lanes<D, Dp>(s.sum, factor, rows, at<Scalar>(call.out, batch, q_head + head), call.out.position,
                     is_past_caches<Scalar, D>(call.out, call.batch, call.q_len, call.num_q_heads));
  }

 private:
  // -- products on tiles, one by one: `n` is known to the compiler --

  /// Of the scores of a chunk.
  static constexpr int kScores = 4 * kSteps;
  SPLAT_INLINE void score_product(const State& s, int lane, int chunk, int n) {
    score_step<Dp>(s.query + lane * Dp, key + chunk * kColumnBytes<Dp>, memory.scores[chunk & 1], n);
  }
  SPLAT_INLINE void score_chunk(const State& s, int lane, int chunk) {
    for (int n = 0; n < kScores; ++n) score_product(s, lane, chunk, n);
  }

  /// Chunks that have weights, to be multiplied by their values; `part` columns of 32 have been.
  struct Batch {
    int chunk, count, part;
    bool is_first;  // nothing has been summed before
  };
  /// Of weights and values, added to 32 columns of the sums.
  static constexpr int kSums = 4 * kBatch;
  SPLAT_INLINE void sum_product(State& s, int lane, const Batch& batch, int n) {
    if (n / 4 >= batch.count) return;
    const int slot = (batch.chunk + n / 4) % (2 * kBatch);
    const char* const values =
        finite ? value + (batch.chunk + n / 4) * kPairBytes<Dp> : memory.clean[slot];
    sum_step<Dp>(memory.p[slot], values + batch.part * 2 * kTileBytes, s.sum + lane * Dp + batch.part * 32, n,
                 4 * batch.count, batch.is_first);
  }
  /// What is left of a batch.
  void finish(State& s, int lane, Batch& batch) {
    if (!batch.count) return;
    for (; batch.part < kSteps; ++batch.part)
      for (int n = 0; n < 4 * batch.count; ++n) sum_product(s, lane, batch, n);
    s.summed[lane / kPart] = true;
    batch.count = 0;
  }

  SPLAT_INLINE V score(V product) const {
    if constexpr (Facts::soft_cap) return tanh<T>(product * scale) * (T)(call.soft_cap * kLog2e<double>);
    else return product * scale;
  }
  /// `kRounded`: the score is rounded before the base is subtracted, as it was when it became the base.
  template <bool kRounded> SPLAT_INLINE V weight(V product, V base) const {
    V of = score(product);
    if constexpr (kRounded) asm("" : "+v"(of));
    return exp2<T, true>(of - base);
  }
  /// What the weights of a chunk are made of and go to.
  template <class M> struct Chunk {
    const Part<M>& part;
    int x;  // its first column
    const float *base, *before;
    const char* scores;
    char* p;
    float* total;
    Vec<uint32_t> seen;  // all bits of all weights

    template <bool kMasked, bool kEdges, bool kRounded = false>
    SPLAT_INLINE void row(const ForwardAmx& kernel, int row) {
      const V of_row = splat_of(kRounded && base[row] == -kInfinity<T> ? 0 : base[row]);  // no finite score yet
      V a = kernel.template weight<kRounded>(score_row(scores, row, 0), of_row);
      V b = kernel.template weight<kRounded>(score_row(scores, row, 1), of_row);
      if constexpr (kMasked) {
        a = part.template keep<kEdges>(x, row) ? a : V{};
        b = part.template keep<kEdges>(x + 16, row) ? b : V{};
      }
      const Vec<uint32_t> pair = paired(a, b);
      seen |= pair;
      memcpy(p + row / 16 * kTileBytes + row % 16 * 64, &pair, sizeof pair);
      store(total + row * 16, load(before + row * 16) + (a + b));
    }
  };

  template <bool kEdges, class M> __attribute__((noinline)) void chunks(State& s, const Part<M>& part) {
    const int lane = part.lane, number = lane / kPart;
    Batch batch = {}, coming = {part.begin, 0, 0, false};
    auto advance = [&] {
      finish(s, lane, batch);
      batch = {coming.chunk, coming.count, 0, !s.summed[number]};
      coming = {coming.chunk + coming.count, 0, 0, false};
    };
    score_chunk(s, lane, part.begin);
    for (int k = part.begin; k < part.end; ++k) {
      const int x = part.from + 32 * k, slot = k % (2 * kBatch);
      const bool full = part.is_full(k);
      for (int rows = 0; rows < kRowsAhead; ++rows) ahead.template next<D * (int)sizeof(Scalar)>();
      if (coming.count == kBatch) advance();
      if (s.known[number] != Known::all) raise<kEdges>(s, part, x, full, memory.scores[k & 1], s.known[number]);
      const int next = k + 1 < part.end ? k + 1 : -1;
      for (bool accept = false;; accept = true) {
        const int now = s.current[number];
        Chunk<M> chunk{part, x, s.base + lane, s.total[now] + lane * 16, memory.scores[k & 1], memory.p[slot],
                       s.total[!now] + lane * 16, {}};
        if (accept || s.huge[number]) chunk.seen = rounded_weights<kEdges>(s, chunk, accept ? -1 : next);
        else if (full) weights<false, kEdges>(s, chunk, next, batch);
        else weights<true, kEdges>(s, chunk, next, batch);
        if (accept || !any<float>(bits_as<Vec<int32_t>>(chunk.seen & 0x40004000u))) break;
        advance(), advance();  // weights against the present base
        raise<kEdges>(s, part, x, full, memory.scores[k & 1], Known::none);
      }
      s.current[number] = !s.current[number];
      if (!finite) clean_pairs<Dp, kEdges>(part, x, value + k * kPairBytes<Dp>, memory.clean[slot]);
      ++coming.count;
    }
    advance(), advance();
  }

  /// A chunk's weights, between the scores of chunk `next`, if it is one, and the next part of a batch.
  template <bool kMasked, bool kEdges, class M>
  SPLAT_INLINE void weights(State& s, Chunk<M>& chunk, int next, Batch& batch) {
    const int lane = chunk.part.lane;
    constexpr int kAll = kScores + kSums;
    const bool sums = batch.part < kSteps;
    SPLAT_UNROLL_STEPS
    for (int n = 0; n < kAll; ++n) {
      if (n < kScores && next >= 0) score_product(s, lane, next, n);
      if (n >= kScores && sums) sum_product(s, lane, batch, n - kScores);
      SPLAT_UNROLL
      for (int row = n * kPart / kAll; row < (n + 1) * kPart / kAll; ++row)
        chunk.template row<kMasked, kEdges>(*this, row);
    }
    if (sums) ++batch.part;
  }

  /// A chunk's weights from rounded scores, after the scores of chunk `next`, if it is one. All bits of all weights.
  template <bool kEdges, class M>
  __attribute__((noinline)) Vec<uint32_t> rounded_weights(const State& s, Chunk<M> chunk, int next) {
    if (next >= 0) score_chunk(s, chunk.part.lane, next);
    for (int row = 0; row < kPart; ++row) chunk.template row<true, kEdges, true>(*this, row);
    return chunk.seen;
  }

  /// A base `kHeadroom` above all scores of a chunk; what was summed is scaled down to it. Where some are `known`, only
  /// for rows that have none yet, and so nothing that was summed.
  template <bool kEdges, class M>
  __attribute__((noinline)) void raise(State& s, const Part<M>& part, int x, bool full, const char* scores,
                                       Known known) {
    const int number = part.lane / kPart;
    bool all = true;
    for (int row = 0; row < kPart; row += 16) {
      V square[16], most = splat_of(-kInfinity<T>);
      for (int n = 0; n < 16; ++n) {
        V a = score(score_row(scores, row + n, 0)), b = score(score_row(scores, row + n, 1));
        if (!full) {
          a = part.template keep<kEdges>(x, row + n) ? a : splat_of(-kInfinity<T>);
          b = part.template keep<kEdges>(x + 16, row + n) ? b : splat_of(-kInfinity<T>);
        }
        square[n] = larger<T>(a, larger<T>(b, most));
      }
      transpose<float>(square);
      SPLAT_UNROLL
      for (int n = 0; n < 16; ++n) most = larger<T>(square[n], most);
      float* const base = s.base + part.lane + row;
      const V size = larger<T>(most, -most);
      s.huge[number] |= any_greater<T>(size < kInfinity<T> ? size : V{}, splat_of(kHuge));
      const V old = load(base), none = splat_of(-kInfinity<T>), wanted = larger<T>(old, most + kHeadroom);
      const V next = known == Known::none ? wanted : old == none ? wanted : old;
      store(base, next);
      all &= !any<T>(next == none);
      if (known == Known::some) continue;
      alignas(64) float factor[16];
      store(factor, next == old ? splat_of(1.f) : exp2<T>(old - next));
      for (int n = 0; n < 16; ++n) {
        const int lane = part.lane + row + n;
        float *const total = s.total[s.current[number]] + lane * 16, *const sum = s.sum + lane * Dp;
        store(total, load(total) * factor[n]);
        for (int d = 0; d < Dp && s.summed[number]; d += 16) store(sum + d, load(sum + d) * factor[n]);
      }
    }
    s.known[number] = all || part.all_begin_before(x + 32) ? Known::all : Known::some;
  }

  /// The sums of 16 rows of 16 numbers.
  static SPLAT_INLINE void add_up(const float* rows, float* to) {
    V square[16], sum = {};
    SPLAT_UNROLL
    for (int n = 0; n < 16; ++n) square[n] = load(rows + n * 16);
    transpose<float>(square);
    SPLAT_UNROLL
    for (int n = 0; n < 16; ++n) sum += square[n];
    store(to, sum);
  }

 public:
  static void prepare(const Call& call, Pool& pool) { fill_outputs<Facts>(call, pool); }
};

}  // namespace splat
