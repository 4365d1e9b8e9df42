// One call of a kernel: its arrays, sizes and tables. Plain data, filled by whoever calls (XLA's FFI, ctypes).
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace splat {

/// An array [batch, position, head, head_dim] (or without the last axis); the last axis is contiguous.
struct Array {
  void* data;                       // null: not given
  int64_t batch, position, head;    // elements from one to the next
};

/// What all kernels are called with. Arrays that a kernel does not use are null.
struct Call {
  int64_t batch, q_len, kv_len, num_q_heads, num_kv_heads;
  double scale;     // of the scores
  double soft_cap;  // used where the kernel was generated with a soft cap
  Array query, key, value, out, d_out;
  Array lse, d_lse;                  // [batch, position, head]; natural logarithm, in the kernel's compute type
  Array d_query, d_key, d_value;
  const int32_t* kv_lengths;         // [batch], in [0, kv_len]: keys at or past it are in no pair; null: all keys
  const int32_t* const* tables;      // for every pass: GROUPS, BOUNDS if it has tests, ROWS if it has a map; or RUNS
  const int64_t* num_groups;         // for every pass; or components of RUNS, and its rows of a batch entry (0: of all)
  const int32_t* where;              // [batch, num_q_heads, 3], for score_mod: its batch and head, and row 0's position
  const void* const* arrays;         // that score_mod closes over
};

// Tables are int32; a group is 16 rows (queries in forward and d_query, keys in d_key_value) that lie in one row tile
// of the plan. Columns of a walk are `residue + stride * x`.
//
//   GROUPS [groups, walks, 5]      x0, x1, x2, x3, residue: edges [x0, x1) and [x2, x3) are masked, [x1, x2) is not
//   BOUNDS [tests, 2, rows]        lower and upper bound of x in each row
//   ROWS   [groups, 16]            the rows of each group; at or past the number of rows: padding
//
//   RUNS   [rows, components, 3]   stride, start and count of each row's columns: all that the kernel `decode` reads,
//                                  for all batch entries or for each of them
//
// Without ROWS, group n holds the rows r + step * (16 * k + [0, 16)) with r = n / k_max, k = n % k_max and
// k_max = ceil(ceil(rows / step) / 16).

}  // namespace splat
