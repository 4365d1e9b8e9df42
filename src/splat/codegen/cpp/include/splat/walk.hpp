// Walking: for every row tile, over the columns that its rows have, in segments in which the same lanes take part.
//
// A unit of work is some row tiles of one head (and of the query heads that share its keys). The walked rows that its
// tiles need are brought together in chunks, once for all of them; a tile then goes over its part of the chunk:
//
//     lanes       x0            x1                       x2           x3
//     group 0     |== masked ==|========= full =========|== masked ==|
//     group 1          |== masked ==|========= full =========|== masked ==|
//     segments    | 0 .| 0 1 ..                          ..  | . 1 ..|         a call of the kernel each, or several
#pragma once
#include "splat/tile.hpp"

namespace splat {

/// A masked lane keeps columns with `lower <= x` and/or `x < upper`, by a row of BOUNDS.
template <int kBound_, bool kLower_, bool kUpper_> struct Test {
  static constexpr int kBound = kBound_;
  static constexpr bool kLower = kLower_, kUpper = kUpper_;
};
/// One walk: columns `residue + kStride * x`. Several tests: any holds.
template <int kStride_, bool kFull_, bool kEdges_, class... Tests> struct Walk {
  static constexpr int kStride = kStride_, kWalks = 1, kTests = sizeof...(Tests);
  static constexpr bool kFull = kFull_, kEdges = kEdges_;
};
/// Many walks of one kind; walk n is tested by row n of BOUNDS.
template <int kWalks_, int kStride_, bool kFull_, bool kEdges_> struct Loop {
  static constexpr int kStride = kStride_, kWalks = kWalks_, kTests = 1;
  static constexpr bool kFull = kFull_, kEdges = kEdges_;
};
/// Walks that share a row grouping: rows modulo kStep; 0: rows from a map. kBounds: rows of BOUNDS.
template <int kStep_, int kBounds_, class... Walks> struct Pass {
  static constexpr int kStep = kStep_, kBounds = kBounds_;
  static constexpr int kWalks = (0 + ... + Walks::kWalks);
  static constexpr int kTables = 1 + (kBounds > 0) + (kStep == 0);

  /// Where kStep: residues that some of so many rows have, and groups of each.
  static constexpr int64_t residues(int64_t rows) { return kStep < rows ? kStep : rows; }
  static constexpr int64_t groups_of_residue(int64_t rows) {
    constexpr int64_t of_group = (kStep ? kStep : 1) * (int64_t)kGroup;
    return (rows + of_group - 1) / of_group;
  }
};

/// Columns [from, to) of a block, counted from its first.
struct Interval {
  int from, to;
};

/// What blocks compare: bounds [test][lower, upper][lane] of one row tile.
template <class T, class WalkType> struct Mask;
struct NoMask {
  static constexpr bool kSome = false;
  SPLAT_INLINE Interval full(int, int n) const { return {0, n}; }
};

template <class T, int kStride, bool kFull, bool kEdges, class... Tests>
struct Mask<T, Walk<kStride, kFull, kEdges, Tests...>> {
  static constexpr bool kSome = true;
  alignas(64) Int<T> bounds[(sizeof...(Tests) ? sizeof...(Tests) : 1) * 2][kLanes];
  int x1, x2;  // every lane has the columns between them

  /// The columns of a block of n, from x on, that need no comparison.
  SPLAT_INLINE Interval full(int x, int n) const {
    const int from = within(0, x1 - x, n);
    return {from, within(from, x2 - x, n)};
  }
  void gather(const int32_t* table, int64_t num_rows, const LaneRows& rows, int) {
    int n = 0;
    (gather_one<Tests>(table, num_rows, rows, n++), ...);
  }
  /// The lanes from `lane` on that have column x.
  SPLAT_INLINE Vec<Int<T>> keep(int x, int lane) const {
    Vec<Int<T>> out = {};
    int n = 0;
    ((out |= keep_one<Tests>(x, lane, n++)), ...);
    return out;
  }
  /// Which of some columns a lane has.
  SPLAT_INLINE Vec<Int<T>> keep_columns(Vec<Int<T>> x, int lane) const {
    Vec<Int<T>> out = {};
    int n = 0;
    ((out |= keep_of<Tests>(x, splat_of(bounds[n * 2][lane]), splat_of(bounds[n * 2 + 1][lane])), ++n), ...);
    return out;
  }

 private:
  template <class One> void gather_one(const int32_t* table, int64_t num_rows, const LaneRows& rows, int n) {
    for (int side = 0; side < 2; ++side) {
      const int32_t* from = table + (One::kBound * 2 + side) * num_rows;
      if (sizeof(T) == 4 && rows.complete && rows.at[kLanes - 1] == rows.at[0] + kLanes - 1) {  // neighbours, ascending
        memcpy(bounds[n * 2 + side], from + rows.at[0], sizeof bounds[0]);
        continue;
      }
      for (int lane = 0; lane < kLanes; ++lane)  // no column is kept in a lane without a row
        bounds[n * 2 + side][lane] = rows.at[lane] >= 0 ? from[rows.at[lane]] : (side ? -(1 << 30) : 1 << 30);
    }
  }
  template <class One> SPLAT_INLINE Vec<Int<T>> keep_one(int x, int lane, int n) const {
    return keep_of<One>(splat_of((Int<T>)x), load(bounds[n * 2] + lane), load(bounds[n * 2 + 1] + lane));
  }
  template <class One> static SPLAT_INLINE Vec<Int<T>> keep_of(Vec<Int<T>> x, Vec<Int<T>> lower, Vec<Int<T>> upper) {
    if constexpr (One::kLower && One::kUpper) return (x >= lower) & (x < upper);
    else if constexpr (One::kLower) return x >= lower;
    else return x < upper;
  }
};

template <class T, int kWalks, int kStride, bool kFull, bool kEdges>
struct Mask<T, Loop<kWalks, kStride, kFull, kEdges>> : Mask<T, Walk<kStride, kFull, kEdges, Test<0, true, true>>> {
  using Base = Mask<T, Walk<kStride, kFull, kEdges, Test<0, true, true>>>;
  void gather(const int32_t* table, int64_t num_rows, const LaneRows& rows, int walk) {
    Base::gather(table + 2 * walk * num_rows, num_rows, rows, 0);
  }
};

/// x0, x1, x2, x3 and the residue, of one walk in one group.
struct Span {
  int32_t x0, x1, x2, x3, residue;
};

/// Calls body(x, end, group, groups, x1, x2) for the parts of [from, to) in which the same groups take part; of those,
/// [x1, x2) needs no mask.
template <bool kFull, bool kEdges, class Body>
SPLAT_INLINE void segments(const Span* const (&span)[kGroups], int from, int to, Body&& body) {
  int32_t points[2 * kGroups + 2];
  int num_points = 0;
  auto insert = [&](int32_t x) {
    x = x < from ? from : x > to ? to : x;
    int n = num_points;
    while (n > 0 && points[n - 1] >= x) --n;
    if (n < num_points && points[n] == x) return;
    for (int k = num_points++; k > n; --k) points[k] = points[k - 1];
    points[n] = x;
  };
  for (int g = 0; g < kGroups; ++g)
    if (span[g] && span[g]->x0 < span[g]->x3) insert(span[g]->x0), insert(span[g]->x3);
  for (int n = 0; n + 1 < num_points; ++n) {
    const int32_t a = points[n], b = points[n + 1];
    for (int g = 0; g < kGroups;) {
      auto takes_part = [&](int k) { return k < kGroups && span[k] && span[k]->x0 <= a && span[k]->x3 >= b; };
      if (!takes_part(g)) {
        ++g;
        continue;
      }
      const int first = g;
      int32_t x1 = a, x2 = b;
      for (; takes_part(g); ++g) {
        if (span[g]->x1 > x1) x1 = span[g]->x1;
        if (span[g]->x2 < x2) x2 = span[g]->x2;
      }
      if constexpr (!kEdges) body(a, b, first, g - first, a, b);
      else if (!kFull || x2 < x1) body(a, b, first, g - first, b, b);
      else body(a, b, first, g - first, x1, x2);
    }
  }
}

}  // namespace splat
