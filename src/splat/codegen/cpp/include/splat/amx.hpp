// Intel's matrix tiles for bfloat16: registers of 16 rows of 64 bytes, C[16][16] += A[16][32] B[32][16].
//
// B's rows are pairs: element [i][lane] holds two numbers, of k = 2 i and 2 i + 1. Pairs may be any two as long as A
// has them in the same order; walked rows are paired as (r, 16 + r).
//
// Written with assembly, because gcc 12's intrinsics do not say which memory they read and write.
#pragma once
#include "splat/tile.hpp"

namespace splat {

constexpr int kTileBytes = 1024;

template <int tile> SPLAT_INLINE void tile_load(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(tile) : "memory");
}
template <int tile> SPLAT_INLINE void tile_store(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(tile) : "memory");
}
template <int c, int a, int b> SPLAT_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
template <int tile> SPLAT_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(tile)); }

/// Tiles of 16 rows of 64 bytes, for as long as this lives.
struct Tiles {
  Tiles() {
    struct {
      uint8_t palette, start, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int n = 0; n < 8; ++n) config.row_bytes[n] = 64, config.rows[n] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
};

/// 32 rows of Dp numbers, `step` numbers from one to the next.
struct Rows {
  const bfloat16* at;
  int64_t step;
};

/// Rows of D numbers, of which `count` are there; where not all are, or D is less than Dp, copies with zeros.
template <int D, int Dp> SPLAT_INLINE Rows padded(Rows rows, int count, bfloat16* memory) {
  if (D == Dp && count == 32) return rows;
  memset(memory, 0, 32 * Dp * sizeof *memory);
  for (int n = 0; n < count; ++n) memcpy(memory + n * Dp, rows.at + n * rows.step, D * sizeof *memory);
  return {memory, Dp};
}

/// Rows of the lanes: [lane][Dp], padded with zeros.
template <int D, int Dp>
SPLAT_INLINE void pack_lanes(const bfloat16* from, int64_t position, const LaneRows& rows, bfloat16* to) {
  for (int lane = 0; lane < kLanes; ++lane, to += Dp) {
    const int64_t at = rows.at[lane];
    if (at < 0 || Dp > D) memset(to, 0, Dp * sizeof *to);
    if (at >= 0) memcpy(to, from + at * position, D * sizeof *to);
  }
}

/// 32 numbers, rounded.
SPLAT_INLINE Vec<float> bfloat16s(Vec<float> first, Vec<float> second) {
  Vec<float> out;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(out) : "v"(first), "v"(second));
  return out;
}

/// B tiles of 32 rows, [Dp / 32][first, second 16 rows]: element [i][2 n], [i][2 n + 1] is row n's d = 2 i and the
/// next.
template <int Dp> SPLAT_INLINE void rows_to_columns(Rows rows, char* tiles) {
  for (int d = 0; d < Dp; d += 32)
    for (int half = 0; half < 2; ++half, tiles += kTileBytes) {
      Vec<float> square[16];
      SPLAT_UNROLL
      for (int n = 0; n < 16; ++n) memcpy(&square[n], rows.at + (half * 16 + n) * rows.step + d, 64);
      transpose<float>(square);
      SPLAT_UNROLL
      for (int n = 0; n < 16; ++n) memcpy(tiles + n * 64, &square[n], 64);
    }
}

/// B tiles of 32 rows, [Dp / 16]: element [r][2 d], [r][2 d + 1] is that of rows r and 16 + r. Returns whether all
/// of them are finite.
template <int Dp> SPLAT_INLINE bool pair_rows(Rows rows, char* tiles) {
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint16_t Halves __attribute__((vector_size(64)));
  Halves largest = {};  // magnitude
  for (int r = 0; r < 16; ++r)
    SPLAT_UNROLL
    for (int d = 0; d < Dp; d += 16) {
      Half a, b;
      memcpy(&a, rows.at + r * rows.step + d, sizeof a);
      memcpy(&b, rows.at + (16 + r) * rows.step + d, sizeof b);
      const Vec<uint32_t> low = __builtin_convertvector(a, Vec<uint32_t>);
      const Vec<uint32_t> high = __builtin_convertvector(b, Vec<uint32_t>) << 16;
      const Vec<uint32_t> pair = low | high;
      const Halves magnitude = bits_as<Halves>(pair) & 0x7fff;
      largest = largest > magnitude ? largest : magnitude;
      memcpy(tiles + d / 16 * kTileBytes + r * 64, &pair, sizeof pair);
    }
  return !any<float>(bits_as<Vec<int32_t>>((Halves)(largest >= 0x7f80)));
}

}  // namespace splat
