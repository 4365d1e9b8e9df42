// Row tiles: which rows lie in the lanes, and how they get there and back.
#pragma once
#include "splat/call.hpp"
#include "splat/micro.hpp"
#include "splat/score_mod.hpp"
#include "splat/threads.hpp"

namespace splat {

/// The head's first row.
template <class T> SPLAT_INLINE T* at(const Array& array, int64_t batch, int64_t head) {
  return (T*)array.data + batch * array.batch + head * array.head;
}

constexpr int within(int least, int x, int most) { return x < least ? least : x > most ? most : x; }

/// Row tiles of a unit: as many as half a megabyte holds, which leaves a second-level cache for other things.
constexpr int kMostTiles = 1024 / kLanes;
template <int state_bytes> constexpr int kTilesOf = within(1, (512 << 10) / state_bytes, kMostTiles);
/// Walked rows that are brought together: as many as a quarter holds.
template <int row_bytes> constexpr int kChunkOf = within(64, (256 << 10) / row_bytes / 64 * 64, 4096);
/// Row tiles of a unit whose walked rows stay for the next one.
constexpr int kBandTiles = 64 / kLanes;
/// Those rows: as many as three quarters of a megabyte holds.
template <int row_bytes> constexpr int kRingOf = within(64, (768 << 10) / row_bytes / 64 * 64, 4096);

/// Where walked rows are brought together that the next unit needs again: row x of a lattice lies at x % rows.
struct Ring {
  int32_t at, rows;  // of the memory
  int64_t residue = -1, from = 0, to = 0;  // what is there: [from, to) of a lattice

  /// How many of the lattice's rows [x, x + count), at most `rows`, are not there: the last ones. From now on they are.
  int missing(int64_t lattice, int64_t x, int count) {
    if (lattice != residue || x < from || x > to) residue = lattice, from = to = x;
    const int64_t end = x + count;
    const int fresh = (int)(end > to ? end - to : 0);
    grow(fresh);
    return fresh;
  }
  /// From now on the lattice's next rows are there, too.
  void grow(int count) {
    to += count;
    if (from < to - rows) from = to - rows;
  }
  /// Of the lattice's row x, in the memory.
  int place(int64_t x) const { return at + (int)(x % rows); }
};

/// Asks for a row; `near`: __builtin_prefetch's, 3 is the nearest cache.
template <int bytes, int near> SPLAT_INLINE void ask_for(const char* row) {
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, near);
}
template <class Scalar, int D> SPLAT_INLINE void ask_for(const Scalar* row) {
  ask_for<D * (int)sizeof(Scalar), 3>((const char*)row);
}
/// Rows of a head may lie in a page each, which no processor foresees: loops over rows ask for those that come so many
/// rows later.
constexpr int kSoon = 4;

/// Rows that the next unit needs, asked for one at a time, so that they come while something else is computed: those
/// that are walked, then those in the lanes.
class Ahead {
 public:
  void clear() { walked_.clear(), lanes_.clear(); }
  /// Rows `from + step * n` of an array's head, n < count.
  template <class Scalar>
  void add(bool walked, const Array& array, int64_t batch, int64_t head, int64_t from, int64_t step, int64_t count) {
    const int64_t bytes = array.position * (int64_t)sizeof(Scalar);
    (walked ? walked_ : lanes_).add((const char*)at<Scalar>(array, batch, head) + from * bytes, step * bytes, count);
  }
  /// Asks for a row; whether it is one that is walked.
  template <int bytes> SPLAT_INLINE bool next() {
    const bool walked = !walked_.empty();
    Rows& rows = walked ? walked_ : lanes_;
    if (!rows.empty()) ask_for<bytes, 2>(rows.next());  // into the second-level cache
    return walked;
  }

 private:
  class Rows {
   public:
    void clear() { count_ = done_ = 0; }
    bool empty() const { return done_ == count_; }
    void add(const char* first, int64_t step, int64_t count) {
      if (count > 0 && count_ < kMost) ranges_[count_++] = {first, step, (int32_t)count};
    }
    const char* next() {
      Range& range = ranges_[done_];
      const char* const row = range.at;
      range.at += range.step;
      if (!--range.count) ++done_;
      return row;
    }

   private:
    static constexpr int kMost = 2 * kMostTiles;  // two arrays of as many heads in the lanes, or of as many walks
    struct Range {
      const char* at;
      int64_t step;
      int32_t count;
    };
    Range ranges_[kMost];
    int count_ = 0, done_ = 0;
  };
  Rows walked_, lanes_;
};

/// The rows in the lanes of a row tile; -1: none.
struct LaneRows {
  int32_t at[kLanes];
  bool complete;  // every lane has a row
};

/// lanes[d][lane] = factor * array[row of the lane][d]; 0 in lanes without a row.
template <class Scalar, int D>
SPLAT_INLINE void rows_to_lanes(const Scalar* from, int64_t position, const LaneRows& rows, Compute<Scalar> factor,
                                Compute<Scalar>* lanes) {
  using T = Compute<Scalar>;
  constexpr int W = kWidth<T>, whole = D / W * W;
  alignas(64) static const Scalar none[D] = {};
  for (int lane = 0; lane < kLanes; lane += W) {
    const Scalar* row[W];
    for (int n = 0; n < W; ++n) {
      const int32_t at = rows.at[lane + n];
      row[n] = at < 0 ? none : from + at * position;
    }
    for (int d = 0; d < whole; d += W) {
      Vec<T> square[W];
      SPLAT_UNROLL
      for (int n = 0; n < W; ++n) square[n] = load_as<Scalar>(row[n] + d) * factor;
      transpose<T>(square);
      SPLAT_UNROLL
      for (int n = 0; n < W; ++n) store(lanes + (d + n) * kLanes + lane, square[n]);
    }
    for (int d = whole; d < D; ++d)
      for (int n = 0; n < W; ++n) lanes[d * kLanes + lane + n] = to_compute(row[n][d]) * factor;
  }
}

/// Whether results go past the caches: rows are whole lines, and all of them more than a second-level cache holds, so
/// that who needs them next would not find them there either.
template <class Scalar, int D>
SPLAT_INLINE bool is_past_caches(const Array& array, int64_t batch, int64_t positions, int64_t heads) {
#ifdef SPLAT_AVX512
  constexpr int kLine = 64 / (int)sizeof(Scalar);
  return D % kLine == 0 && (uintptr_t)array.data % 64 == 0 &&
         (array.batch | array.position | array.head) % kLine == 0 &&
         batch * positions * heads * D * (int64_t)sizeof(Scalar) >= 2 << 20;
#else
  return false;
#endif
}

/// A vector of a result; `past_caches` as `is_past_caches` says.
template <class Scalar> SPLAT_INLINE void store_result(Scalar* to, Vec<Compute<Scalar>> v, bool past_caches) {
#ifdef SPLAT_AVX512
  if constexpr (sizeof(Scalar) == sizeof(Compute<Scalar>))
    if (past_caches) return store_past_caches(to, v);
#endif
  store_as<Scalar>(to, v);
}

/// A row of a result.
template <class Scalar, int D>
SPLAT_INLINE void put_row(const Compute<Scalar>* from, Scalar* to, bool past_caches) {
  constexpr int W = kWidth<Compute<Scalar>>, whole = D / W * W;
  for (int d = 0; d < whole; d += W) store_result<Scalar>(to + d, load(from + d), past_caches);
  for (int d = whole; d < D; ++d) to[d] = from_compute<Scalar>(from[d]);
}

/// array[row of the lane][d] = lanes[d][lane] * factor[lane]; lanes without a row are left out.
template <class Scalar, int D>
SPLAT_INLINE void lanes_to_rows(const Compute<Scalar>* lanes, const Compute<Scalar>* factor, const LaneRows& rows,
                                Scalar* to, int64_t position, bool past_caches) {
  using T = Compute<Scalar>;
  constexpr int W = kWidth<T>, whole = D / W * W;
  for (int lane = 0; lane < kLanes; lane += W) {
    const Vec<T> times = load(factor + lane);
    for (int d = 0; d < whole; d += W) {
      Vec<T> square[W];
      SPLAT_UNROLL
      for (int n = 0; n < W; ++n) square[n] = load(lanes + (d + n) * kLanes + lane) * times;
      transpose<T>(square);
      SPLAT_UNROLL
      for (int n = 0; n < W; ++n)
        if (rows.at[lane + n] >= 0) store_result<Scalar>(to + rows.at[lane + n] * position + d, square[n], past_caches);
    }
    for (int d = whole; d < D; ++d)
      for (int n = 0; n < W; ++n)
        if (rows.at[lane + n] >= 0)
          to[rows.at[lane + n] * position + d] = from_compute<Scalar>(lanes[d * kLanes + lane + n] * times[n]);
  }
}

/// Rows of the walked side, one after the other: rows `first + step * n` for n < count, in the compute type.
template <class Scalar, int D>
SPLAT_INLINE void pack_rows(const Scalar* from, int64_t position, int64_t first, int64_t step, int count,
                            Compute<Scalar>* to) {
  using T = Compute<Scalar>;
  constexpr int W = kWidth<T>, whole = D / W * W;
  const Scalar* row = from + first * position;
  for (int n = 0; n < count; ++n, row += step * position, to += D) {
    if (n + kSoon < count) ask_for<Scalar, D>(row + kSoon * step * position);
    for (int d = 0; d < whole; d += W) store(to + d, load_as<Scalar>(row + d));
    for (int d = whole; d < D; ++d) to[d] = to_compute(row[d]);
  }
}

/// Whether a head's rows lie one after the other in the compute type, so that they need not be brought together.
template <class Scalar, int D> SPLAT_INLINE bool is_packed(const Array& array) {
  return sizeof(Scalar) >= 4 && array.position == D;
}

/// Rows `first + step * n` one after the other: where they are, or in `memory`, where the last `fresh` are missing.
template <class Scalar, int D>
SPLAT_INLINE const Compute<Scalar>* walked_rows(const Array& array, int64_t batch, int64_t head, int64_t first,
                                                int64_t step, int count, int fresh, Compute<Scalar>* memory) {
  const Scalar* from = at<Scalar>(array, batch, head);
  if constexpr (sizeof(Scalar) >= 4)
    if (step == 1 && array.position == D) return from + first * D;
  const int there = count - fresh;
  pack_rows<Scalar, D>(from, array.position, first + step * there, step, fresh, memory + there * D);
  return memory;
}

/// From sums of 2^(score - base) and the bases: 1 / total for the output, and the rows' log-sum-exp where `lse` is.
template <class T>
SPLAT_INLINE void finish_softmax(const T* base, const T* total, const LaneRows& rows, T* factor, T* lse,
                                 int64_t position) {
  constexpr int W = kWidth<T>;
  alignas(64) T made[kLanes];
  for (int lane = 0; lane < kLanes; lane += W) {
    const Vec<T> sum = load(total + lane);
    store(factor + lane, sum == (T)0 ? Vec<T>{} : (T)1 / sum);
    const Vec<T> natural = (load(base + lane) + log2<T>(sum)) * kLn2<T>;
    const Vec<T> known = sum == sum ? natural : sum;  // NaN stays NaN
    store(made + lane, sum == (T)0 ? splat_of(-kInfinity<T>) : known);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (rows.at[lane] >= 0) lse[rows.at[lane] * position] = made[lane];
}

/// sum over d of a[d] * b[d].
template <class Scalar, int D> SPLAT_INLINE Compute<Scalar> dot(const Scalar* a, const Scalar* b) {
  using T = Compute<Scalar>;
  constexpr int W = kWidth<T>, whole = D / W * W;
  Vec<T> sums = {};
  for (int d = 0; d < whole; d += W) sums += load_as<Scalar>(a + d) * load_as<Scalar>(b + d);
  T sum = sum_of<T>(sums);
  for (int d = whole; d < D; ++d) sum += to_compute(a[d]) * to_compute(b[d]);
  return sum;
}

/// The factor of what lies in the lanes, so that their products are scores base 2 (or tanh's argument, or what a score
/// modification takes), `scale` being the scores' own.
template <class Facts> SPLAT_INLINE double lane_factor(const Call& call, double scale) {
  return Facts::modified ? scale : Facts::soft_cap ? scale / call.soft_cap : scale * kLog2e<double>;
}
template <class Facts> SPLAT_INLINE double lane_factor(const Call& call) {
  return lane_factor<Facts>(call, call.scale);
}

/// The factor of modified scores.
template <class Facts> SPLAT_INLINE double after_modification(const Call& call) {
  return Facts::soft_cap ? 1 / call.soft_cap : kLog2e<double>;
}

/// A score that is capped, base 2, `tanh` being its own. What a modification has hidden stays so.
template <class Facts, class V> SPLAT_INLINE V capped(const Call& call, V score, V tanh) {
  using T = Compute<typename Facts::Scalar>;
  const V out = tanh * (T)(call.soft_cap * kLog2e<double>);
  if constexpr (Facts::modified) return score == -kInfinity<T> ? score : out;
  else return out;
}

/// The rows in the lanes of a row tile and its query head, where a score modification asks for them.
template <class Facts, bool = Facts::modified> struct Place {
  static constexpr int64_t head = 0;
  void set(int64_t, const LaneRows&) {}
};
template <class Facts> struct Place<Facts, true> {
  using Index = Int<Compute<typename Facts::Scalar>>;
  alignas(64) Index lanes[kLanes];
  int64_t head;
  void set(int64_t head_, const LaneRows& rows) {
    head = head_;
    Index known = 0;  // lanes without a row have their group's last one, whose scores have a meaning
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = known = rows.at[lane] < 0 ? known : rows.at[lane];
  }
};

/// Walked rows: number n of a block is `first + step * n`.
struct WalkedRows {
  int64_t first, step;
};

/// What a score modification is told of a walked row and a vector of lanes.
template <class Facts, bool kKeysInLanes>
SPLAT_INLINE auto score_place(const Call& call, int64_t batch, int64_t head, const Place<Facts>& place, int lane,
                              WalkedRows walked, int n) {
  using T = Compute<typename Facts::Scalar>;
  if constexpr (Facts::modified) {
    const int32_t* const where = call.where + (batch * call.num_q_heads + head) * 3;
    const Vec<Int<T>> lanes = load(place.lanes + lane);
    const Int<T> other = (Int<T>)(walked.first + walked.step * n);
    if constexpr (kKeysInLanes)
      return mod::At<T, Int<T>, Vec<Int<T>>>{call.arrays, where[0], where[1], where[2], other, lanes};
    else return mod::At<T, Vec<Int<T>>, Int<T>>{call.arrays, where[0], where[1], where[2], lanes, other};
  }
}

/// body(batch, head) for all of them, on the pool's threads.
template <class Body> void for_heads(Pool& pool, int64_t batch, int64_t heads, Body&& body) {
  parallel_for(pool, batch * heads, [&](int64_t index) { body(index / heads, index % heads); });
}

/// Sets rows of a head of a result to 0.
template <class Scalar, int D>
void clear_rows(const Array& array, int64_t batch, int64_t head, int64_t from, int64_t to) {
  Scalar* const rows = at<Scalar>(array, batch, head);
  for (int64_t i = from; i < to; ++i) memset(rows + i * array.position, 0, D * sizeof(Scalar));
}

/// Output and log-sum-exp of rows that no tile has.
template <class Facts> void fill_outputs(const Call& call, Pool& pool) {
  using Scalar = typename Facts::Scalar;
  using T = Compute<Scalar>;
  if (!Facts::fill) return;
  for_heads(pool, call.batch, call.num_q_heads, [&](int64_t b, int64_t h) {
    clear_rows<Scalar, Facts::head_dim>(call.out, b, h, 0, call.q_len);
    for (int64_t i = 0; i < call.q_len; ++i) at<T>(call.lse, b, h)[i * call.lse.position] = -kInfinity<T>;
  });
}

}  // namespace splat
