// Attention of few queries, as when one token after the other is decoded: what forward.hpp computes, without lanes for
// queries that are not there.
//
// Keys and values are read where they are, once for up to 16 queries of heads that share them, as fast as memory gives
// them. The elements of a row lie in the lanes:
//
//     scores   sum[query, key][lane]  +=  query[d + lane] * key[d + lane]     kWidth such sums, then each one's lanes
//     sums     out[query][d + lane]   +=  weight[query, key] * value[d + lane]
//
// What a query attends to is read as the format has it, start, count and stride of each component: no mask is needed,
// nothing else is read, and one library serves all patterns, whichever token has come. Many columns are shared out
// between parts, by their number alone, so that results do not depend on threads; who is last merges them.
#pragma once
#include "splat/run.hpp"

namespace splat {

template <class Facts> class Decode {
  using Scalar = typename Facts::Scalar;
  using T = Compute<Scalar>;
  static constexpr int D = Facts::head_dim, W = kWidth<T>, kVectors = (D + W - 1) / W, kPadded = kVectors * W;
  /// Queries (of all heads) of a unit: what they need stays in the nearest cache.
  static constexpr int kPairs = within(4, (64 << 10) / (2 * kPadded * (int)sizeof(T)), 16);
  static constexpr int kBlock = within(16, 8192 / (D * (int)sizeof(Scalar)) / 16 * 16, 64);  // keys at a time
  static constexpr int kTogether = W < 4 ? W : 4;  // queries at a time
  /// Columns that are worth a part, most parts, and most of all places: whose results wait in memory.
  static constexpr int kPart = 512, kMostParts = 32, kMostWaiting = 4096;

  struct Result {
    alignas(64) T sum[kPadded];
    T base, total;  // sum and total are of 2^(score - base)
  };
  struct State {
    alignas(64) T query[kPairs][kPadded];
    alignas(64) T sum[kPairs][kPadded];
    alignas(64) T p[kTogether][kBlock];
    Vec<T> total[kPairs];
    T base[kPairs];
  };

 public:
  explicit Decode(const Call& call) : call(call) {
    group = call.num_q_heads / call.num_kv_heads;
    rows_of_unit = call.q_len < kPairs ? call.q_len : kPairs;
    heads_of_unit = kPairs / rows_of_unit;
    if (heads_of_unit > group) heads_of_unit = group;
    row_parts = ceil_div(call.q_len, kPairs), head_parts = ceil_div(group, heads_of_unit);
    if (call.key.head < call.key.position && head_parts * row_parts == 1) {  // their rows lie in the same pages
      kv_heads_of_unit = kPairs / (rows_of_unit * group);
      if (kv_heads_of_unit > call.num_kv_heads) kv_heads_of_unit = call.num_kv_heads;
    }
    const int64_t units = call.batch * call.num_kv_heads * head_parts * row_parts;  // at most
    most_parts = units > kMostWaiting ? 1 : kMostWaiting / units < kMostParts ? kMostWaiting / units : kMostParts;
    const int64_t of_batch = num_places() / call.batch;
    for (int64_t n = 0; n < call.batch * row_parts; ++n) {
      const int64_t wanted = parts_for(columns(place_of(n / row_parts * of_batch + n % row_parts)));
      if (wanted > parts) parts = wanted;
    }
  }

  void run(Pool& pool) {
    const int64_t threads = pool.num_threads, most = kv_heads_of_unit;
    int64_t places = num_places();
    auto is_uneven = [&](int64_t units) { return units < threads || (units % threads && units < 4 * threads); };
    for (int64_t n = 2; kv_heads_of_unit > 1 && is_uneven(places * parts); ++n)
      kv_heads_of_unit = ceil_div(most, n), places = num_places();
    pairs = rows_of_unit * heads_of_unit * kv_heads_of_unit;
    if (parts > 1) {
      const int64_t bytes = places * parts * pairs * (int64_t)sizeof(Result);
      results = (Result*)scratch(bytes + places * sizeof(int32_t));  // units have nothing else there
      finished = (int32_t*)((char*)results + bytes);
      memset(finished, 0, places * sizeof(int32_t));
    }
    parallel_for(pool, places * parts, [&](int64_t index) { unit(index % places, index / places); });
  }

 private:
  const Call& call;
  int64_t group, rows_of_unit, heads_of_unit, kv_heads_of_unit = 1, row_parts, head_parts;
  int64_t most_parts, parts = 1, pairs;  // pairs: of a unit
  Result* results = nullptr;    // [place][part][pair]
  int32_t* finished = nullptr;  // parts of a place

  /// Where a unit is: its first row, query head and key head, and how many it has (query heads of each key head).
  struct Place {
    int64_t batch, kv_head, q_head, row;
    int kv_heads, rows, heads;

    int pairs() const { return kv_heads * rows * heads; }
  };
  Place place_of(int64_t index) const {
    const int64_t row = index % row_parts * kPairs, of_row = index / row_parts;
    const int64_t head = of_row % head_parts * heads_of_unit, every = of_row / head_parts;
    const int64_t of_batch = ceil_div(call.num_kv_heads, kv_heads_of_unit);
    const int64_t kv_head = every % of_batch * kv_heads_of_unit;
    auto smaller = [](int64_t a, int64_t b) { return (int)(a < b ? a : b); };
    return {every / of_batch, kv_head, kv_head * group + head, row,
            smaller(kv_heads_of_unit, call.num_kv_heads - kv_head), smaller(rows_of_unit, call.q_len - row),
            smaller(heads_of_unit, group - head)};
  }
  int64_t num_places() const {
    return call.batch * ceil_div(call.num_kv_heads, kv_heads_of_unit) * head_parts * row_parts;
  }

  int64_t parts_for(int64_t columns) const {
    const int64_t wanted = columns / kPart;
    return wanted < 1 ? 1 : wanted < most_parts ? wanted : most_parts;
  }

  /// A row's columns of one component: start + stride * [0, count).
  struct Run {
    int64_t stride, start, count;

    int64_t end() const { return start + (count - 1) * stride + 1; }
    /// How many of them lie before a position.
    int64_t before(int64_t position) const {
      const int64_t number = position > start ? ceil_div(position - start, stride) : 0;
      return number < count ? number : count;
    }
  };
  /// Those before `limit`.
  Run run_of(const Place& place, int slot, int64_t component, int64_t limit) const {
    const int64_t row = place.batch * call.num_groups[1] + place.row + slot;
    const int32_t* const numbers = call.tables[0] + (row * call.num_groups[0] + component) * 3;
    Run run = {numbers[0], numbers[1], numbers[2]};
    run.count = run.before(limit);
    return run;
  }

  struct Columns {
    int64_t first;
    int count;

    bool operator==(const Columns& other) const { return count == other.count && (count <= 0 || first == other.first); }
  };
  /// Those of a run in [low, high).
  static Columns between(const Run& run, int64_t low, int64_t high) {
    const int64_t t = run.before(low);
    return {run.start + run.stride * t, (int)(run.before(high) - t)};
  }

  int64_t limit_of(const Place& place) const { return call.kv_lengths ? call.kv_lengths[place.batch] : call.kv_len; }

  /// Calls body(component, stride, first, end) for those that a unit's rows have, all between [first, end).
  template <class Body> void over_components(const Place& place, int64_t limit, Body&& body) const {
    for (int64_t n = 0; n < call.num_groups[0]; ++n) {
      int64_t stride = 1, first = limit, end = 0;
      for (int slot = 0; slot < place.rows; ++slot) {
        const Run run = run_of(place, slot, n, limit);
        if (run.count <= 0) continue;
        stride = run.stride;
        if (run.start < first) first = run.start;
        if (run.end() > end) end = run.end();
      }
      if (first < end) body(n, stride, first, end);
    }
  }
  int64_t columns(const Place& place) const {
    int64_t count = 0;
    over_components(place, limit_of(place), [&](int64_t, int64_t stride, int64_t first, int64_t end) {
      count += ceil_div(end - first, stride);
    });
    return count;
  }

  void unit(int64_t index, int64_t part) {
    const Place place = place_of(index);
    const int64_t limit = limit_of(place), all = columns(place), num_parts = parts_for(all);
    if (part >= num_parts) return;
    State state;
    begin(state, place);
    const int64_t from = all * part / num_parts, to = all * (part + 1) / num_parts;
    int64_t seen = 0;
    over_components(place, limit, [&](int64_t component, int64_t stride, int64_t first, int64_t end) {
      const int64_t low = from > seen ? from - seen : 0, count = ceil_div(end - first, stride);
      const int64_t high = to - seen < count ? to - seen : count;
      seen += count;
      for (int64_t x = low; x < high; x += kBlock) {  // while it is near, for all rows that have something there
        const int64_t next = first + stride * (x + kBlock < high ? x + kBlock : high);
        for (int slot = 0, same; slot < place.rows; slot += same) {
          const Columns some = between(run_of(place, slot, component, limit), first + stride * x, next);
          for (same = 1; slot + same < place.rows; ++same)  // neighbours often have the same ones
            if (!(between(run_of(place, slot + same, component, limit), first + stride * x, next) == some)) break;
          for (int head = 0; some.count > 0 && head < place.kv_heads; ++head)
            attend(state, place, head, slot, same, some.first, stride, some.count);
        }
      }
    });
    if (num_parts == 1) return end(state, place);
    Result* const of_place = results + index * parts * pairs;
    for (int pair = 0; pair < place.pairs(); ++pair) {
      Result& result = of_place[part * pairs + pair];
      memcpy(result.sum, state.sum[pair], sizeof result.sum);
      result.base = state.base[pair], result.total = sum_of<T>(state.total[pair]);
    }
    if (__atomic_add_fetch(&finished[index], 1, __ATOMIC_ACQ_REL) == num_parts) merge(of_place, place, num_parts);
  }

  /// Pairs of a unit go through its key heads, its rows, and the query heads.
  int64_t row_of(const Place& place, int pair) const { return place.row + pair / place.heads % place.rows; }
  int64_t head_of(const Place& place, int pair) const {
    return place.q_head + pair / (place.heads * place.rows) * group + pair % place.heads;
  }

  void begin(State& state, const Place& place) const {
    const T factor = (T)lane_factor<Facts>(call);
    for (int pair = 0; pair < place.pairs(); ++pair) {
      const Scalar* const row =
          at<Scalar>(call.query, place.batch, head_of(place, pair)) + row_of(place, pair) * call.query.position;
      for (int d = 0; d < kPadded; d += W) {
        store(state.query[pair] + d, elements(row, d) * factor);
        store(state.sum[pair] + d, Vec<T>{});
      }
      state.total[pair] = Vec<T>{}, state.base[pair] = -kInfinity<T>;
    }
  }

  /// A row's elements from d on; 0 past the last.
  static SPLAT_INLINE Vec<T> elements(const Scalar* row, int d) {
    if (D % W == 0 || d + W <= D) return load_as<Scalar>(row + d);
    Scalar some[W] = {};
    memcpy(some, row + kPadded - W, (D - kPadded + W) * sizeof(Scalar));
    return load_as<Scalar>(some);
  }

  /// Rows of an array's head, and how far each is from the last.
  struct Rows {
    const Scalar* first;
    int64_t step;

    SPLAT_INLINE const Scalar* at(int n) const { return first + n * step; }
    /// Asks for a row: into the second-level cache, for a block is more than the nearest has room for.
    SPLAT_INLINE void soon(int n) const { ask_for<D * (int)sizeof(Scalar), 2>((const char*)at(n)); }
  };
  Rows rows_of(const Array& array, const Place& place, int head, int64_t first, int64_t stride) const {
    return {at<Scalar>(array, place.batch, place.kv_head + head) + first * array.position, stride * array.position};
  }

  /// `rows` rows from `slot` on, in all query heads of a key head, to `n` keys.
  void attend(
      State& state, const Place& place, int head, int slot, int rows, int64_t first, int64_t stride, int n) const {
    const Rows keys = rows_of(call.key, place, head, first, stride);
    const Rows values = rows_of(call.value, place, head, first, stride);
    int pair = (head * place.rows + slot) * place.heads;
    const int last = pair + rows * place.heads;
    if constexpr (kTogether == 4)
      for (; pair + 4 <= last; pair += 4) block<4>(state, pair, keys, values, n);
    for (; pair + 2 <= last; pair += 2) block<2>(state, pair, keys, values, n);
    for (; pair < last; ++pair) block<1>(state, pair, keys, values, n);
  }

  /// NQ queries from `pair` on to `n` keys. Meanwhile their values come, and the keys of the next block.
  template <int NQ>
  __attribute__((noinline)) void block(State& state, int pair, Rows keys, Rows values, int n) const {
    scores<NQ>(state, pair, keys, n, [&](int k) SPLAT_INLINED { values.soon(k); });
    for (int q = 0; q < NQ; ++q) weights(state, pair + q, state.p[q], n);
    constexpr int kMost = (kRegisters == 32 ? 24 : 12) / NQ, kParts = (kVectors + kMost - 1) / kMost;
    constexpr int kOfPart = (kVectors + kParts - 1) / kParts, kRest = kVectors % kOfPart;
    sums<NQ, kOfPart>(state, pair, 0, values, n, [&](int k) SPLAT_INLINED { keys.soon(n + k); });
    for (int v = kOfPart; v + kOfPart <= kVectors; v += kOfPart)
      sums<NQ, kOfPart>(state, pair, v * W, values, n, [](int) SPLAT_INLINED {});
    if constexpr (kRest > 0) sums<NQ, kRest>(state, pair, (kVectors - kRest) * W, values, n, [](int) SPLAT_INLINED {});
  }

  /// see(k) is called once for each key.
  template <int NQ, class See>
  SPLAT_INLINE void scores(State& state, int pair, Rows keys, int n, See&& see) const {
    constexpr int kKeys = W / NQ;
    for (int k = 0; k < n; k += kKeys) {
      const Scalar* row[kKeys];
      SPLAT_UNROLL
      for (int j = 0; j < kKeys; ++j) {
        row[j] = keys.at(k + j < n ? k + j : n - 1);
        see(k + j < n ? k + j : n - 1);
      }
      Vec<T> sum[W];
      SPLAT_UNROLL
      for (int i = 0; i < W; ++i) sum[i] = Vec<T>{};
      SPLAT_UNROLL2
      for (int d = 0; d < kPadded; d += W) {
        Vec<T> query[NQ];
        SPLAT_UNROLL
        for (int q = 0; q < NQ; ++q) query[q] = load(state.query[pair + q] + d);
        SPLAT_UNROLL
        for (int j = 0; j < kKeys; ++j) {
          const Vec<T> x = elements(row[j], d);
          SPLAT_UNROLL
          for (int q = 0; q < NQ; ++q) sum[q * kKeys + j] += x * query[q];
        }
      }
      Vec<T> score = lane_sums<T>(sum);
      if constexpr (Facts::soft_cap) score = tanh<T>(score) * (T)(call.soft_cap * kLog2e<double>);
      SPLAT_UNROLL
      for (int q = 0; q < NQ; ++q) memcpy(state.p[q] + k, (const T*)&score + q * kKeys, kKeys * sizeof(T));
    }
    for (int q = 0; q < NQ; ++q)
      for (int k = n; k % W; ++k) state.p[q][k] = -kInfinity<T>;
  }

  /// Scores become weights of the pair's softmax so far, whose maximum is only raised when it must be.
  SPLAT_INLINE void weights(State& state, int pair, T* p, int n) const {
    Vec<T> most = splat_of(-kInfinity<T>);
    for (int k = 0; k < n; k += W) most = larger<T>(most, load(p + k));
    if (any_greater<T>(most, splat_of(state.base[pair] + kSlack))) raise(state, pair, most);
    const T base = state.base[pair] == -kInfinity<T> ? 0 : state.base[pair];
    Vec<T> total = state.total[pair];
    for (int k = 0; k < n; k += W) {
      const Vec<T> weight = exp2<T>(load(p + k) - base);
      total += weight;
      store(p + k, weight);
    }
    state.total[pair] = total;
  }

  static constexpr T kSlack = 8;  // in powers of 2

  static __attribute__((noinline)) void raise(State& state, int pair, Vec<T> most) {
    T next = most[0];
    for (int n = 1; n < W; ++n) next = next > most[n] ? next : most[n];
    const Vec<T> factor = exp2<T>(splat_of(state.base[pair] - next));
    state.base[pair] = next, state.total[pair] *= factor;
    for (int d = 0; d < kPadded; d += W) store(state.sum[pair] + d, load(state.sum[pair] + d) * factor);
  }

  /// Elements from d on, NV vectors of them; see(k) is called for each key.
  template <int NQ, int NV, class See>
  SPLAT_INLINE void sums(State& state, int pair, int d, Rows values, int n, See&& see) const {
    Vec<T> sum[NQ][NV];
    SPLAT_UNROLL
    for (int q = 0; q < NQ; ++q) {
      SPLAT_UNROLL
      for (int v = 0; v < NV; ++v) sum[q][v] = load(state.sum[pair + q] + d + v * W);
    }
    for (int k = 0; k < n; ++k) {
      see(k);
      SPLAT_UNROLL
      for (int v = 0; v < NV; ++v) {
        const Vec<T> x = elements(values.at(k), d + v * W);
        SPLAT_UNROLL
        for (int q = 0; q < NQ; ++q) sum[q][v] += state.p[q][k] * x;
      }
    }
    SPLAT_UNROLL
    for (int q = 0; q < NQ; ++q) {
      SPLAT_UNROLL
      for (int v = 0; v < NV; ++v) store(state.sum[pair + q] + d + v * W, sum[q][v]);
    }
  }

  void end(State& state, const Place& place) const {
    for (int pair = 0; pair < place.pairs(); ++pair)
      put(place, pair, state.sum[pair], state.base[pair], sum_of<T>(state.total[pair]));
  }

  /// The parts in their order, whoever was last.
  void merge(const Result* of_place, const Place& place, int64_t count) const {
    for (int pair = 0; pair < place.pairs(); ++pair) {
      T base = -kInfinity<T>, total = 0;
      for (int64_t n = 0; n < count; ++n)
        if (of_place[n * pairs + pair].base > base) base = of_place[n * pairs + pair].base;
      alignas(64) T sum[kPadded] = {};
      for (int64_t n = 0; n < count; ++n) {
        const Result& one = of_place[n * pairs + pair];
        Vec<T> factor = exp2<T>(splat_of(one.base - base));
        if (one.base == -kInfinity<T>) factor = splat_of(one.total * 0);  // 0, or NaN
        total += one.total * factor[0];
        for (int d = 0; d < kPadded; d += W) store(sum + d, load(sum + d) + load(one.sum + d) * factor);
      }
      put(place, pair, sum, base, total);
    }
  }

  /// A row of the output and its log-sum-exp.
  void put(const Place& place, int pair, T* sum, T base, T total) const {
    const int64_t head = head_of(place, pair), row = row_of(place, pair);
    const T factor = total == 0 ? 0 : 1 / total;
    for (int d = 0; d < kPadded; d += W) store(sum + d, load(sum + d) * factor);
    put_row<Scalar, D>(sum, at<Scalar>(call.out, place.batch, head) + row * call.out.position, false);
    const T natural = (base + log2<T>(splat_of(total))[0]) * kLn2<T>;
    at<T>(call.lse, place.batch, head)[row * call.lse.position] =
        total == 0 ? -kInfinity<T> : total == total ? natural : total;
  }
};

template <class Facts> void decode(const Call& call, Pool& pool) {
  if (call.batch * call.num_q_heads * call.q_len > 0) Decode<Facts>(call).run(pool);
}

}  // namespace splat
