// Attention in bfloat16 on matrix tiles: what forward.hpp computes, 32 keys by 32 queries at a time.
//
// The exponentials take longer than the products, so that the products of the next 32 keys are put between them. Weights
// are taken against a base that is set once, 2^40 above the largest score of some keys, and hardly ever changes: a weight
// of 2 or more is seen in its bits, and the keys are done again with a larger base.
#pragma once
#include "splat/amx.hpp"
#include "splat/run.hpp"

namespace splat {

template <class Facts> struct ForwardAmx {
  using Scalar = bfloat16;
  using T = float;
  using V = Vec<float>;
  static constexpr int D = Facts::head_dim, Dp = (D + 31) / 32 * 32, kSteps = Dp / 32, kSlices = Dp / 16;
  static constexpr bool kKeysInLanes = false, kGuard = Facts::guard, kFill = Facts::fill, kOwnSegments = true;
  static constexpr bool kUnpacks = false, kWholeHeads = false;
  static constexpr int kVectors = kMaxVectors, kTiles = kTilesOf<(4 + 2) * Dp * kLanes>;
  static constexpr int kChunk = kChunkOf<2 * 2 * Dp>, kMost = 8;  // chunks of 32 keys in a block
  static constexpr float kHeadroom = 40;

  struct State {
    alignas(64) char query[kGroups * kSteps * kTileBytes];  // B tiles [group][step]
    alignas(64) float sum[Dp * kLanes];                     // [d][lane]
    alignas(64) float base[kLanes], total[kLanes];          // weights are 2^(score - base)
    bool known[2];                                          // whether `base` is set, in each half of the lanes
  };
  struct Scratch {
    State tiles[kTiles];
    alignas(64) bfloat16 key[kChunk * Dp], rows[32 * Dp];
    alignas(64) char value[kChunk / 32 * kSlices * kTileBytes];       // A tiles [chunk][slice]
    alignas(64) char scores[2][4 * kTileBytes];                       // C tiles [first, second 16 keys][group]
    alignas(64) char p[kMost * 2 * kTileBytes];                       // B tiles [chunk][group]
    alignas(64) char clean[kMost * kSlices * kTileBytes];
  };

  const Call& call;
  Scratch& memory;
  const bool first;
  int64_t batch, kv_head, q_head;
  bool finite;
  float scale;  // of the products, to scores base 2 (or to tanh's argument)
  Tiles config;

  void start(int64_t batch_, int64_t kv_head_, int64_t q_head_) {
    batch = batch_, kv_head = kv_head_, q_head = q_head_;
    scale = (float)(Facts::soft_cap ? call.scale / call.soft_cap : call.scale * kLog2e<double>);
  }
  int walked_heads() const { return 1; }
  template <int kStride> int chunk() const { return kChunk; }

  void begin(int tile, int head, const LaneRows& rows) {
    State& s = memory.tiles[tile];
    lanes_to_tiles<D, Dp>(at<Scalar>(call.query, batch, q_head + head), call.query.position, rows, s.query);
    s.known[0] = s.known[1] = !first;
    memset(s.sum, 0, sizeof s.sum);
    memset(s.total, 0, sizeof s.total);
    for (int lane = 0; lane < kLanes; ++lane) s.base[lane] = -kInfinity<T>;
    if (first) return;
    rows_to_lanes<Scalar, D>(at<Scalar>(call.out, batch, q_head + head), call.out.position, rows, 1, s.sum);
    const T* lse = at<T>(call.lse, batch, q_head + head);
    for (int lane = 0; lane < kLanes; ++lane) {
      s.base[lane] = rows.at[lane] < 0 ? -kInfinity<T> : lse[rows.at[lane] * call.lse.position] * kLog2e<T>;
      s.total[lane] = s.base[lane] == -kInfinity<T> ? 0 : 1;
    }
  }

  void pack(int, int64_t from, int64_t step, int count) {
    pack_row_major<D, Dp>(at<Scalar>(call.key, batch, kv_head), call.key.position, from, step, count, memory.key);
    finite = true;
    for (int n = 0; n < count; n += 32) {
      const int rest = count - n < 32 ? count - n : 32;
      pack_row_major<D, Dp>(at<Scalar>(call.value, batch, kv_head), call.value.position, from + step * n, step, rest,
                            memory.rows);
      finite &= pack_transposed<Dp>(memory.rows, memory.value + n / 32 * kSlices * kTileBytes);
    }
  }

  /// The columns of one half of the lanes, two groups, in the chunk of columns [from, to).
  template <class M> struct Half {
    const M& mask;
    int lane, from, to;
    Span span[2];

    bool is_full(int chunk) const {
      const int x = from + 32 * chunk;
      return x + 32 <= to && x >= span[0].x1 && x >= span[1].x1 && x + 32 <= span[0].x2 && x + 32 <= span[1].x2;
    }
    /// Which lanes of a group have column x.
    template <bool kEdges> SPLAT_INLINE Vec<int32_t> keep(int x, int group) const {
      const Span& s = span[group];
      if (x < s.x0 || x >= s.x3 || x >= to) return Vec<int32_t>{};
      if constexpr (!kEdges) return ~Vec<int32_t>{};
      else return x >= s.x1 && x < s.x2 ? ~Vec<int32_t>{} : mask.keep(x, lane + group * kGroup);
    }
  };

  template <bool kEdges, class M>
  void tile(int index, const Span* const (&spans)[kGroups], int from, int to, const M& mask) {
    for (int part = 0; part < 2; ++part) {
      Half<M> half{mask, part * 32, from, to, {}};
      int low = 1 << 30, high = -(1 << 30);
      for (int g = 0; g < 2; ++g) {
        if (!spans[2 * part + g] || spans[2 * part + g]->x0 >= spans[2 * part + g]->x3) continue;
        half.span[g] = *spans[2 * part + g];
        if (half.span[g].x0 < low) low = half.span[g].x0;
        if (half.span[g].x3 > high) high = half.span[g].x3;
      }
      if (low < from) low = from;
      if (high > to) high = to;
      if (low >= high) continue;
      const int begin = (low - from) / 32, end = (high - from + 31) / 32, parts = (end - begin + kMost - 1) / kMost;
      const int size = (end - begin + parts - 1) / parts;
      for (int c = begin; c < end; c += size) block<kEdges>(memory.tiles[index], half, c, c + size < end ? size : end - c);
    }
  }

  void end(int tile, int head, const LaneRows& rows) {
    State& s = memory.tiles[tile];
    alignas(64) T factor[kLanes];
    finish_softmax(s.base, s.total, rows, factor, at<T>(call.lse, batch, q_head + head), call.lse.position);
    lanes_to_rows<Scalar, D>(s.sum, factor, rows, at<Scalar>(call.out, batch, q_head + head), call.out.position);
  }

 private:
  /// The products of 32 keys and 32 queries, step by step: `between(n)` is called after each of the 4 kSteps products.
  template <class Between> SPLAT_INLINE void products(const State& s, int lane, int chunk, char* to, Between&& between) {
    const char* query = s.query + lane / kGroup * kSteps * kTileBytes;
    const bfloat16* key = memory.key + chunk * 32 * Dp;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    SPLAT_UNROLL
    for (int n = 0; n < kSteps; ++n) {
      tile_load<4>(key + n * 32, Dp * 2);
      tile_load<6>(query + n * kTileBytes, 64);
      tile_dot<0, 4, 6>(), between(4 * n);
      tile_load<7>(query + (kSteps + n) * kTileBytes, 64);
      tile_dot<1, 4, 7>(), between(4 * n + 1);
      tile_load<5>(key + 16 * Dp + n * 32, Dp * 2);
      tile_dot<2, 5, 6>(), between(4 * n + 2);
      tile_dot<3, 5, 7>(), between(4 * n + 3);
    }
    tile_store<0>(to, 64), tile_store<1>(to + kTileBytes, 64);
    tile_store<2>(to + 2 * kTileBytes, 64), tile_store<3>(to + 3 * kTileBytes, 64);
  }

  SPLAT_INLINE V score(V product) const {
    if constexpr (Facts::soft_cap) return tanh<T>(product * scale) * (T)(call.soft_cap * kLog2e<double>);
    else return product * scale;
  }
  SPLAT_INLINE V weight(V product, V base) const { return exp2<T, true>(score(product) - base); }
  /// Row r of a weight tile: keys r and 16 + r, rounded to bfloat16.
  static SPLAT_INLINE Vec<uint32_t> paired(V a, V b) {
    return ((bits_as<Vec<uint32_t>>(a) + 0x8000u) >> 16) | ((bits_as<Vec<uint32_t>>(b) + 0x8000u) & 0xffff0000u);
  }

  /// What the weights of a block add up to, in each group of lanes, and all their bits.
  struct Sums {
    V total[2];
    Vec<uint32_t> seen;
  };

  SPLAT_INLINE void weights_row(const char* scores, char* p, int r, int group, V base, Sums& sums) const {
    const V a = weight(load((const float*)(scores + group * kTileBytes) + r * 16), base);
    const V b = weight(load((const float*)(scores + (2 + group) * kTileBytes) + r * 16), base);
    const Vec<uint32_t> pair = paired(a, b);
    sums.total[group] += a + b;
    sums.seen |= pair;
    memcpy(p + group * kTileBytes + r * 64, &pair, sizeof pair);
  }

  template <bool kEdges, class M>
  void masked_weights(const Half<M>& half, int chunk, const char* scores, char* p, const V (&base)[2],
                      Sums& sums) const {
    for (int group = 0; group < 2; ++group)
      for (int r = 0; r < 16; ++r) {
        V w[2];
        for (int k = 0; k < 2; ++k) {
          const Vec<int32_t> keep = half.template keep<kEdges>(half.from + 32 * chunk + 16 * k + r, group);
          const V product = load((const float*)(scores + (2 * k + group) * kTileBytes) + r * 16);
          w[k] = keep ? weight(product, base[group]) : V{};
        }
        const Vec<uint32_t> pair = paired(w[0], w[1]);
        sums.total[group] += w[0] + w[1];
        sums.seen |= pair;
        memcpy(p + group * kTileBytes + r * 64, &pair, sizeof pair);
      }
  }

  template <bool kEdges, class M>
  __attribute__((noinline)) void block(State& s, const Half<M>& half, int chunk, int count) {
    if (!s.known[half.lane / 32]) {
      int best = 0;
      while (best + 1 < count && !half.is_full(chunk + best)) ++best;
      if (!half.is_full(chunk + best)) best = 0;
      raise<kEdges>(s, half, chunk + best, 1);
      s.known[half.lane / 32] = true;
    }
    if (!weights<kEdges>(s, half, chunk, count, false)) {
      raise<kEdges>(s, half, chunk, count);
      weights<kEdges>(s, half, chunk, count, true);
    }
    const char* value = memory.value + chunk * kSlices * kTileBytes;
    if (!finite) value = clean_values<kEdges>(half, chunk, count);
    sum_up(s, half.lane, value, count);
  }

  /// Weights of `count` chunks, added to the lanes' totals; false, and nothing added, where one is too large for the base
  /// and not accepted as it is.
  template <bool kEdges, class M>
  bool weights(State& s, const Half<M>& half, int chunk, int count, bool accept) {
    const V base[2] = {load(s.base + half.lane), load(s.base + half.lane + kGroup)};
    Sums sums = {};
    products(s, half.lane, chunk, memory.scores[0], [](int) {});
    for (int k = 0; k < count; ++k) {
      char *const now = memory.scores[k & 1], *const next = memory.scores[~k & 1], *const p = memory.p + k * 2 * kTileBytes;
      const bool more = k + 1 < count;
      if (half.is_full(chunk + k)) {
        constexpr int kRowsOf = 32 / (4 * kSteps) > 0 ? 32 / (4 * kSteps) : 1;  // between two products
        if (more) {
          products(s, half.lane, chunk + k + 1, next, [&](int n) {
            SPLAT_UNROLL
            for (int i = 0; i < kRowsOf; ++i) {
              const int row = n * kRowsOf + i;
              if (row < 32) weights_row(now, p, row & 15, row >> 4, base[row >> 4], sums);
            }
          });
        }
        for (int row = more ? 4 * kSteps * kRowsOf : 0; row < 32; ++row)
          weights_row(now, p, row & 15, row >> 4, base[row >> 4], sums);
      } else {
        if (more) products(s, half.lane, chunk + k + 1, next, [](int) {});
        masked_weights<kEdges>(half, chunk + k, now, p, base, sums);
      }
    }
    if (!accept && any<float>(bits_as<Vec<int32_t>>(sums.seen & 0x40004000u))) return false;
    for (int group = 0; group < 2; ++group) {
      float* const total = s.total + half.lane + group * kGroup;
      store(total, load(total) + sums.total[group]);
    }
    return true;
  }

  /// A base `kHeadroom` above all scores of `count` chunks; what was summed is scaled down to it.
  template <bool kEdges, class M>
  __attribute__((noinline)) void raise(State& s, const Half<M>& half, int chunk, int count) {
    V most[2] = {splat_of(-kInfinity<T>), splat_of(-kInfinity<T>)};
    for (int k = 0; k < count; ++k) {
      const bool full = half.is_full(chunk + k);
      products(s, half.lane, chunk + k, memory.scores[0], [](int) {});
      for (int group = 0; group < 2; ++group)
        for (int r = 0; r < 32; ++r) {
          V product = load((const float*)(memory.scores[0] + (r / 16 * 2 + group) * kTileBytes) + r % 16 * 16);
          product = score(product);
          if (!full) {
            const Vec<int32_t> keep = half.template keep<kEdges>(half.from + 32 * (chunk + k) + r, group);
            product = keep ? product : splat_of(-kInfinity<T>);
          }
          most[group] = larger<T>(product, most[group]);
        }
    }
    for (int group = 0; group < 2; ++group) {
      const int lane = half.lane + group * kGroup;
      const V old = load(s.base + lane), next = larger<T>(old, most[group] + kHeadroom);
      const V factor = next == old ? splat_of(1.f) : exp2<T>(old - next);
      store(s.base + lane, next);
      if (!s.known[half.lane / 32]) continue;
      store(s.total + lane, load(s.total + lane) * factor);
      for (int d = 0; d < Dp; ++d) store(s.sum + d * kLanes + lane, load(s.sum + d * kLanes + lane) * factor);
    }
  }

  /// The value tiles without the keys that no lane has, so that nothing of them reaches a result.
  template <bool kEdges, class M> const char* clean_values(const Half<M>& half, int chunk, int count) {
    memcpy(memory.clean, memory.value + chunk * kSlices * kTileBytes, count * kSlices * kTileBytes);
    for (int n = 0; n < 32 * count; ++n) {
      Vec<int32_t> some = {};
      for (int group = 0; group < 2; ++group) some |= half.template keep<kEdges>(half.from + 32 * chunk + n, group);
      if (any<float>(some)) continue;
      auto* tiles = (uint16_t*)(memory.clean + n / 32 * kSlices * kTileBytes);
      for (int d = 0; d < Dp; ++d) tiles[d * 32 + n % 16 * 2 + n % 32 / 16] = 0;
    }
    return memory.clean;
  }

  SPLAT_INLINE void sum_up(State& s, int lane, const char* value, int count) {
    constexpr int64_t kRow = kLanes * sizeof(float);
    for (int n = 0; n < kSlices; n += 2) {
      float* const sum = s.sum + n * 16 * kLanes + lane;
      tile_load<0>(sum, kRow), tile_load<1>(sum + kGroup, kRow);
      tile_load<2>(sum + 16 * kLanes, kRow), tile_load<3>(sum + 16 * kLanes + kGroup, kRow);
      for (int k = 0; k < count; ++k) {
        const char *const p = memory.p + k * 2 * kTileBytes, *const v = value + (k * kSlices + n) * kTileBytes;
        tile_load<4>(v, 64), tile_load<6>(p, 64), tile_dot<0, 4, 6>();
        tile_load<7>(p + kTileBytes, 64), tile_dot<1, 4, 7>();
        tile_load<5>(v + kTileBytes, 64), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
      }
      tile_store<0>(sum, kRow), tile_store<1>(sum + kGroup, kRow);
      tile_store<2>(sum + 16 * kLanes, kRow), tile_store<3>(sum + 16 * kLanes + kGroup, kRow);
    }
  }

 public:
  static void prepare(const Call& call) {
    if (!kFill) return;
    for (int64_t b = 0; b < call.batch; ++b) {
      clear_rows<Scalar, D>(call.out, b, call.num_q_heads, 0, call.q_len);
      for (int64_t h = 0; h < call.num_q_heads; ++h)
        for (int64_t i = 0; i < call.q_len; ++i) at<T>(call.lse, b, h)[i * call.lse.position] = -kInfinity<T>;
    }
  }
};

}  // namespace splat
