// The driver: cuts a pass into units of work, and carries each of them through a kernel.
//
// A kernel is a class with
//   T, kTiles, kChunk          compute type; row tiles that a unit may have; walked rows that a chunk may have
//   kKeysInLanes               whether the lanes hold keys (dK, dV) or queries
//   kFill                      whether no pass visits every row, so that the results are filled in first
//   prepare(call, pool)        once for a call: results of rows that no pass visits
//   Scratch                    its memory, one for a thread
//   start(batch, kv_head, q_head)   once for a unit; the first head of the lanes
//   walked_heads()             how many heads are walked, one after the other, into the same tiles
//   begin(tile, head, rows)    before the first walk of a tile; `head` counts from the unit's first
//   kRing                      walked rows that may stay for the next unit; 0: none do
//   in_place(step)             whether walked rows that many apart are used where they are
//   pack(head, first, step, count, place, fresh)   brings together walked rows first + step * n from `place` on, of
//                              which the last `fresh` are missing there; `place` is 0 and all are, but for rings
//   kInLanes, kWalked, ahead   where kRing: the arrays of either side, and what asks for the next unit's rows
//   kCopiesAhead               whether it also copies them: copy_ahead(ring, first, step, count), which may do any part
//                              of it until the unit ends, a count of 0 nothing
//   block<NV>(tile, lane, at, n, x, mask)   works on n of them, from number `at` on, in NV vectors from `lane` on
//   end(tile, head, rows)
//   kKeeps                     whether what was packed stays for later units, so that chunks are always whole
//   kWholeHeads                whether a key head is one thread's, because its units write to the same rows
//   open(batch, kv_head), close()   before the first and after the last unit of a key head, where kWholeHeads
//   kOwnSegments               instead of block: tile<edges>(tile, spans, from, to, mask) works on columns [from, to)
#pragma once
#include "splat/walk.hpp"

namespace splat {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t floor_to(int64_t a, int64_t b) { return (a >= 0 ? a / b : -ceil_div(-a, b)) * b; }

/// Most columns in a block: a multiple of the micro-kernel's rows.
template <int NV> constexpr int kBlock = kBlockColumns / kRows<NV> * kRows<NV>;

/// Columns [low, high) of a walk; none where low >= high.
struct Columns {
  int32_t low = 1 << 30, high = -(1 << 30);
};
/// All between the first and the last that some of `count` groups have, whose spans are `walks` apart.
inline Columns hull(const Span* spans, int64_t count, int walks) {
  Columns all;
  for (int64_t g = 0; g < count; ++g, spans += walks) {
    if (spans->x0 >= spans->x3) continue;
    if (spans->x0 < all.low) all.low = spans->x0;
    if (spans->x3 > all.high) all.high = spans->x3;
  }
  return all;
}

/// Walks of a pass whose rows may stay.
constexpr int kMaxRings = 8;

/// The units of a pass.
struct Grid {
  int64_t num_rows, residues, groups_of_residue, tiles_of_residue, tiles_of_unit, units_of_residue, units;
  int64_t heads, head_parts;  // query heads in the tiles of one unit, and units that share a key head's
  bool last_first;
  bool by_band;  // units are few row tiles, and walked rows stay for the next one
  Ring rings[kMaxRings];
};

template <class Kernel, class PassType> struct Runner {
  using T = typename Kernel::T;
  static constexpr int kStep = PassType::kStep;
  static constexpr int kGroupsOfTile = kStep ? kGroups : 1;

  const Call& call;
  const Grid& grid;
  const int32_t* const groups;
  const int32_t* const bounds;
  const int32_t* const map;
  Kernel kernel;
  LaneRows rows[Kernel::kTiles];
  int64_t first_group[Kernel::kTiles];
  int num_groups[Kernel::kTiles];
  int num_tiles, heads;
  int64_t limit;  // of walked rows
  Ring rings[kMaxRings];
  int64_t head_of_rings = -1;
  int64_t next_group;  // of the next unit, where it follows in the same lattice; -1: it does not
  int next_num_groups;

  /// Unit `index` of a key head, those of all batch entries counted through.
  void unit(int64_t every_head, int64_t index) {
    const int64_t from_start = index / grid.head_parts;
    const int64_t part = grid.last_first ? grid.units - 1 - from_start : from_start;
    const int64_t residue = part / grid.units_of_residue, first = part % grid.units_of_residue * grid.tiles_of_unit;
    const int64_t batch = every_head / call.num_kv_heads, kv_head = every_head % call.num_kv_heads;
    const int64_t group = Kernel::kKeysInLanes ? 1 : call.num_q_heads / call.num_kv_heads;
    const int64_t head = index % grid.head_parts * grid.heads;
    heads = (int)(group - head < grid.heads ? group - head : grid.heads);
    const int64_t left = grid.tiles_of_residue - first;
    num_tiles = (int)(left < grid.tiles_of_unit ? left : grid.tiles_of_unit);
    const int64_t keys = call.kv_lengths ? call.kv_lengths[batch] : call.kv_len;
    limit = Kernel::kKeysInLanes ? call.q_len : keys;
    for (int t = 0; t < num_tiles; ++t) find_rows(t, residue, first + t, Kernel::kKeysInLanes ? keys : grid.num_rows);
    kernel.start(batch, kv_head, kv_head * group + head);
    if constexpr (Kernel::kRing > 0)
      if (grid.by_band) prepare_next(every_head, residue, first + num_tiles);
    for (int t = 0; t < num_tiles; ++t)
      for (int h = 0; h < heads; ++h) kernel.begin(t * heads + h, h, rows[t]);
    for (int walked = 0; walked < kernel.walked_heads(); ++walked) walk_all(walked, (PassType*)nullptr);
    for (int t = 0; t < num_tiles; ++t)
      for (int h = 0; h < heads; ++h) kernel.end(t * heads + h, h, rows[t]);
  }

 private:
  /// What is known of a unit's successor.
  void prepare_next(int64_t every_head, int64_t residue, int64_t tile) {
    if (head_of_rings != every_head)
      for (int n = 0; n < kMaxRings; ++n) rings[n] = grid.rings[n];
    head_of_rings = every_head;
    kernel.ahead.clear();
    const int64_t from = tile * kGroupsOfTile, left = grid.groups_of_residue - from;
    next_group = left > 0 ? residue * grid.groups_of_residue + from : -1;
    const int64_t most = kGroupsOfTile * grid.tiles_of_unit;
    next_num_groups = (int)(left < most ? left : most);
    if constexpr (kStep > 0) {
      const int64_t row = residue + kStep * from * kGroup, count = next_num_groups * kGroup;
      const int64_t rows_left = row < grid.num_rows ? ceil_div(grid.num_rows - row, kStep) : 0;
      for (int h = 0; h < heads; ++h)
        look_ahead(false, Kernel::kInLanes, Kernel::kKeysInLanes ? kernel.kv_head : kernel.q_head + h, row, kStep,
                   count < rows_left ? count : rows_left);
    }
  }

  template <size_t n>
  void look_ahead(bool walked, Array Call::*const (&arrays)[n], int64_t head, int64_t from, int64_t step,
                  int64_t count) {
    for (auto array : arrays)
      kernel.ahead.template add<typename Kernel::Scalar>(walked, call.*array, kernel.batch, head, from, step, count);
  }

  void find_rows(int t, int64_t residue, int64_t tile, int64_t num_rows) {
    const int64_t from = tile * kGroupsOfTile, left = grid.groups_of_residue - from;
    num_groups[t] = (int)(left < kGroupsOfTile ? left : kGroupsOfTile);
    first_group[t] = residue * grid.groups_of_residue + from;
    rows[t].complete = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      int64_t row = -1;
      if (lane < num_groups[t] * kGroup) {
        if constexpr (kStep == 0) row = map[first_group[t] * kGroup + lane];
        else row = residue + kStep * (from * kGroup + lane);
      }
      const bool here = row >= 0 && row < num_rows;
      rows[t].at[lane] = here ? (int32_t)row : -1;
      rows[t].complete &= here;
    }
  }

  template <int kStepOf, int kBounds, class... Walks> void walk_all(int head, Pass<kStepOf, kBounds, Walks...>*) {
    int number = 0;
    (walk_kind<Walks>(head, number), ...);
  }

  template <class WalkType> void walk_kind(int head, int& number) {
    for (int n = 0; n < WalkType::kWalks; ++n, ++number) walk<WalkType>(head, number, n);
  }

  const Span* span(int64_t group, int number) const {
    return (const Span*)groups + group * PassType::kWalks + number;
  }

  template <class WalkType> __attribute__((noinline)) void walk(int head, int number, int n) {
    constexpr int64_t kStride = WalkType::kStride;
    int32_t low[Kernel::kTiles], high[Kernel::kTiles], least = 1 << 30, most = -(1 << 30), residue = 0;
    for (int t = 0; t < num_tiles; ++t)
      for (int g = 0; g < num_groups[t]; ++g) {
        const Span& s = *span(first_group[t] + g, number);
        if (s.residue > residue) residue = s.residue;
      }
    const int64_t columns = limit > residue ? ceil_div(limit - residue, kStride) : 0;
    const int32_t stop = (int32_t)(columns < (1 << 30) ? columns : 1 << 30);
    for (int t = 0; t < num_tiles; ++t) {
      const Columns own = hull(span(first_group[t], number), num_groups[t], PassType::kWalks);
      low[t] = own.low, high[t] = own.high < stop ? own.high : stop;
      if (low[t] >= high[t]) continue;
      if (low[t] < least) least = low[t];
      if (high[t] > most) most = high[t];
    }
    // Rows that stay where they are come in chunks as well, so that sums do not depend on where rows lie.
    const int32_t size = grid.by_band ? rings[number].rows : Kernel::kChunk;
    Ring* const ring = grid.by_band && !kernel.in_place(kStride) ? &rings[number] : nullptr;
    Columns next;  // of the next unit, that this one has not
    if constexpr (Kernel::kRing > 0) {
      if (grid.by_band && next_group >= 0) {
        next = hull(span(next_group, number), next_num_groups, PassType::kWalks);
        if (next.low < most) next.low = most;
        if (next.high > stop) next.high = stop;
        if (next.low < next.high)
          look_ahead(true, Kernel::kWalked, Kernel::kKeysInLanes ? kernel.q_head + head : kernel.kv_head,
                     residue + kStride * next.low, kStride, next.high - next.low);
      }
    }
    // They can be copied when this unit's are all there, if they follow them and the ring has room for both.
    bool may_copy = Kernel::kCopiesAhead && ring && next.low == most && next.low < next.high &&
                    next.high - least <= size;
    for (int g = 0; may_copy && g < next_num_groups; ++g) {
      const Span& s = *span(next_group + g, number);
      may_copy = s.x0 >= s.x3 || s.residue == residue;
    }
    for (int64_t base = floor_to(least, size); base < most; base += size) {
      int32_t from = 1 << 30, to = -(1 << 30);
      for (int t = 0; t < num_tiles; ++t) {
        const int32_t a = low[t] > base ? low[t] : (int32_t)base;
        const int32_t b = high[t] < base + size ? high[t] : (int32_t)(base + size);
        if (a >= b) continue;
        if (a < from) from = a;
        if (b > to) to = b;
      }
      if (from >= to) continue;
      if constexpr (Kernel::kKeeps) from = (int32_t)base, to = (int32_t)(base + size < stop ? base + size : stop);
      if constexpr (Kernel::kOwnSegments) {  // the same parts, wherever a unit begins and ends
        from = (int32_t)floor_to(from, 32), to = (int32_t)(ceil_div(to, 32) * 32);
        if (to > base + size) to = (int32_t)(base + size);
        if (to > stop) to = stop;
      }
      const int place = ring ? ring->place(from) : 0;
      const int fresh = ring ? ring->missing(residue, from, to - from) : to - from;
      kernel.pack(head, residue + kStride * from, kStride, to - from, place, fresh);
      if constexpr (Kernel::kCopiesAhead) {
        const bool copies = may_copy && ring->to >= most;
        if (copies || base == floor_to(least, size))
          kernel.copy_ahead(ring, residue + kStride * next.low, kStride, copies ? next.high - next.low : 0);
        may_copy &= !copies;
      }
      for (int t = 0; t < num_tiles; ++t)
        if (low[t] < to && high[t] > from) tile<WalkType>(t, number, n, from, to < high[t] ? to : high[t]);
    }
  }

  template <class WalkType> void tile(int t, int number, int n, int from, int to) {
    const Span* spans[kGroups] = {};
    for (int g = 0; g < num_groups[t]; ++g) spans[g] = span(first_group[t] + g, number);
    Mask<T, WalkType> mask;
    if constexpr (Kernel::kOwnSegments) {
      if constexpr (WalkType::kEdges) mask.gather(bounds, grid.num_rows, rows[t], n);
      for (int h = 0; h < heads; ++h) kernel.template tile<WalkType::kEdges>(t * heads + h, spans, from, to, mask);
    } else {
      bool gathered = false;
      for (int h = 0; h < heads; ++h)
        segments<WalkType::kFull, WalkType::kEdges>(
            spans, from, to, [&](int x, int end, int group, int count, int x1, int x2) {
              const int index = t * heads + h, lane = group * kGroup, lanes = count * kGroup;
              if constexpr (!WalkType::kEdges) {
                blocks(index, lane, lanes, from, x, end, NoMask());
              } else {
                mask.x1 = x1, mask.x2 = x2;
                if (!gathered && (x < x1 || x2 < end)) mask.gather(bounds, grid.num_rows, rows[t], n), gathered = true;
                if constexpr (Kernel::kGuard) {
                  kept_blocks(index, lane, lanes, from, x, x1, mask);
                  if (x1 < x2) blocks(index, lane, lanes, from, x1, x2, mask);
                  kept_blocks(index, lane, lanes, from, x2, end, mask);
                } else {
                  blocks(index, lane, lanes, from, x, end, mask);
                }
              }
            });
    }
  }

  /// Only the columns that some lane has: what lies in others reaches no result.
  template <class M>
  void kept_blocks(int index, int lane, int lanes, int from, int x, int end, const M& mask) {
    auto kept = [&](int at) {
      Vec<Int<T>> some = {};
      for (int v = 0; v < lanes; v += kWidth<T>) some |= mask.keep(at, lane + v);
      return any<T>(some);
    };
    while (x < end) {
      while (x < end && !kept(x)) ++x;
      int next = x;
      while (next < end && kept(next)) ++next;
      if (x < next) blocks(index, lane, lanes, from, x, next, mask);
      x = next;
    }
  }

  template <class M>
  SPLAT_INLINE void blocks(int index, int lane, int lanes, int from, int x, int end, const M& mask) {
    constexpr int kAll = kGroupsOfTile * kGroup / kWidth<T>, kMost = kAll < Kernel::kVectors ? kAll : Kernel::kVectors;
    for (int done = 0; done < lanes;) {
      const int vectors = (lanes - done) / kWidth<T>;
      const int taken = vectors < kMost ? vectors : kMost;
      with_vectors<kMost>(taken, index, lane + done, from, x, end, mask);
      done += taken * kWidth<T>;
    }
  }

  template <int NV, class M>
  SPLAT_INLINE void with_vectors(int vectors, int index, int lane, int from, int x, int end, const M& mask) {
    constexpr int kOfGroup = kGroup / kWidth<T> > 0 ? kGroup / kWidth<T> : 1;
    if constexpr (NV > 0) {
      if (NV == vectors && (NV % kOfGroup == 0 || NV == Kernel::kVectors)) {
        const int length = end - x, parts = (length + kBlock<NV> - 1) / kBlock<NV>;
        const int even = (length + parts - 1) / parts, size = (even + kRows<NV> - 1) / kRows<NV> * kRows<NV>;
        for (; x < end; x += size)
          kernel.template block<NV>(index, lane, x - from, x + size < end ? size : end - x, x, mask);
      } else {
        with_vectors<NV - 1>(vectors, index, lane, from, x, end, mask);
      }
    }
  }
};

/// A ring for each walk of a pass in a memory of `room` rows; false where that is too small for what most units walk.
/// The few that walk more (those of global tokens) bring their rows together in as many chunks as they need.
template <class PassType>
bool lay_out_rings(const int32_t* groups, int64_t num_groups, int64_t groups_of_residue, int32_t room, Ring* rings) {
  constexpr int kGroupsOfUnit = kBandTiles * (PassType::kStep ? kGroups : 1);
  int32_t used = 0;
  int64_t all = 0, too_wide = 0;  // columns of units
  for (int w = 0; w < PassType::kWalks; ++w) {
    int32_t width = 0;  // of the columns that a unit has, the most
    for (int64_t n = 0; n < num_groups;) {
      const int64_t left = groups_of_residue - n % groups_of_residue;
      const int64_t count = left < kGroupsOfUnit ? left : kGroupsOfUnit;
      const Columns own = hull((const Span*)groups + n * PassType::kWalks + w, count, PassType::kWalks);
      const int32_t columns = own.high > own.low ? own.high - own.low : 0;
      all += columns;
      const bool fits = columns <= room;
      if (!fits) too_wide += columns;
      if (const int32_t held = fits ? columns : kBlockColumns; held > width) width = held;
      n += count;
    }
    rings[w] = {used, (int32_t)ceil_div(width + 63, 64) * 64};
    used += rings[w].rows;
    if (used > room) return false;
  }
  const int32_t times = used ? room / used : 1;  // the larger, the more rarely a unit has two chunks
  for (int w = 0; w < PassType::kWalks; ++w) rings[w].at *= times, rings[w].rows *= times;
  return too_wide <= all / 4;
}

/// The numbers of rows, tiles and units of a pass.
template <class Kernel, class PassType>
Grid make_grid(const Call& call, const int32_t* groups, int64_t num_groups, int num_threads) {
  constexpr int kStep = PassType::kStep;
  Grid grid;
  grid.num_rows = Kernel::kKeysInLanes ? call.kv_len : call.q_len;
  const int64_t group = Kernel::kKeysInLanes ? 1 : call.num_q_heads / call.num_kv_heads;
  grid.heads = group < Kernel::kTiles ? group : Kernel::kTiles;
  grid.residues = kStep ? PassType::residues(grid.num_rows) : num_groups;
  grid.groups_of_residue = kStep ? PassType::groups_of_residue(grid.num_rows) : 1;
  grid.tiles_of_residue = kStep ? ceil_div(grid.groups_of_residue, kGroups) : 1;
  // Units as large as the scratch memory allows, but enough of them for all threads.
  const int64_t tiles = grid.residues * grid.tiles_of_residue * call.batch * call.num_kv_heads;
  while (grid.heads > 1 && tiles * ceil_div(group, grid.heads) < num_threads) grid.heads = ceil_div(grid.heads, 2);
  grid.head_parts = ceil_div(group, grid.heads);
  int64_t wanted = tiles / (8 * num_threads);
  if (wanted > Kernel::kTiles / grid.heads) wanted = Kernel::kTiles / grid.heads;
  if constexpr (Kernel::kKeeps) {
    int32_t width = 0;  // of the columns that a group has, the most
    for (int64_t n = 0; n < num_groups * PassType::kWalks; ++n) {
      const Span& s = ((const Span*)groups)[n];
      if (s.x3 - s.x0 > width) width = s.x3 - s.x0;
    }
    const int64_t most = Kernel::tiles_for(width) / grid.heads;
    if (wanted > most) wanted = most;
  }
  grid.by_band = false;
  const bool one_head = !Kernel::kKeysInLanes || call.num_q_heads == call.num_kv_heads;  // is walked
  if constexpr (Kernel::kRing > 0 && PassType::kWalks <= kMaxRings)
    grid.by_band = one_head && lay_out_rings<PassType>(groups, num_groups, grid.groups_of_residue, Kernel::kRing,
                                                       grid.rings);
  if (grid.by_band && wanted > kBandTiles) wanted = kBandTiles;
  grid.tiles_of_unit = wanted < 1 ? 1 : wanted < grid.tiles_of_residue ? wanted : grid.tiles_of_residue;
  grid.units_of_residue = ceil_div(grid.tiles_of_residue, grid.tiles_of_unit);
  grid.units = grid.residues * grid.units_of_residue;
  int64_t first = 0, last = 0;  // longest first: whichever end has more to do
  for (int w = 0; w < PassType::kWalks && num_groups; ++w) {
    const Span &a = ((const Span*)groups)[w], &b = ((const Span*)groups)[(num_groups - 1) * PassType::kWalks + w];
    first += a.x3 - a.x0, last += b.x3 - b.x0;
  }
  grid.last_first = last > first && !Kernel::kWholeHeads && !grid.by_band;
  return grid;
}

/// Where unit `index` of all heads lies: `together` units of a head are followed by the same ones of the next head.
struct HeadUnit {
  int64_t head, unit;
};
inline HeadUnit head_unit(int64_t index, int64_t units, int64_t heads, int64_t together) {
  const int64_t batch = index / (heads * units), here = index % (heads * units);
  const int64_t whole = units / together * together;
  const bool is_whole = here < whole * heads;
  const int64_t size = is_whole ? together : units - whole, first = is_whole ? here / (size * heads) * size : whole;
  const int64_t of_block = here - first * heads;
  return {batch * heads + of_block / size, first + of_block % size};
}

/// A permutation of [0, count) in which the first numbers, as many as there are threads, are far apart.
inline int64_t apart(int64_t n, int64_t count, int64_t threads) {
  const int64_t columns = ceil_div(count, threads), whole = count - (columns - 1) * threads;  // rows that are complete
  const int64_t column = n / threads, row = n % threads;
  return row < whole ? row * columns + column : whole * columns + (row - whole) * (columns - 1) + column;
}

template <class Kernel, class PassType>
void run_pass(const Call& call, Pool& pool, const int32_t* const*& tables, const int64_t*& num_groups, bool first) {
  const int32_t* groups = *tables++;
  const int32_t* bounds = PassType::kBounds ? *tables++ : nullptr;
  const int32_t* map = PassType::kStep ? nullptr : *tables++;
  const int threads = Kernel::kWholeHeads ? 1 : pool.num_threads;
  const Grid grid = make_grid<Kernel, PassType>(call, groups, *num_groups++, threads);
  const int64_t heads = call.batch * call.num_kv_heads, units = grid.units * grid.head_parts;
  const int64_t all = Kernel::kWholeHeads ? heads : heads * units;
  // Neighbouring units have walked rows in common: a thread takes some one after the other.
  const int64_t least = grid.by_band ? within(1, (int)(all / (16 * pool.num_threads)), 4) : 0;
  // Heads that are interleaved lie in the same pages: the next head comes when units have nothing more in common.
  const bool interleaved = grid.by_band && call.key.head < call.key.position;
  const int64_t together = interleaved && PassType::kStep > 1 ? grid.units_of_residue : units;
  parallel_runs(pool, all, least, [&](int64_t from, int64_t to) {
    auto* memory = (typename Kernel::Scratch*)scratch(sizeof(typename Kernel::Scratch));
    Runner<Kernel, PassType> runner{call, grid, groups, bounds, map, Kernel{call, *memory, first}};
    for (int64_t index = from; index < to; ++index) {
      if constexpr (Kernel::kWholeHeads) {
        const int64_t head = apart(index, heads, pool.num_threads);
        runner.kernel.open(head / call.num_kv_heads, head % call.num_kv_heads);
        for (int64_t unit = 0; unit < units; ++unit) runner.unit(head, unit);
        runner.kernel.close();
      } else {
        const HeadUnit at = head_unit(index, units, call.num_kv_heads, together);
        runner.unit(at.head, at.unit);
      }
    }
  });
}

/// All passes one after the other: a later one goes on from what is there.
template <class Kernel, class... Passes> void run(const Call& call, Pool& pool) {
  Kernel::prepare(call, pool);
  const int32_t* const* tables = call.tables;
  const int64_t* num_groups = call.num_groups;
  bool first = !Kernel::kFill;
  ((run_pass<Kernel, Passes>(call, pool, tables, num_groups, first), first = false), ...);
}

}  // namespace splat
