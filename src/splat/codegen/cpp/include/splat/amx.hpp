// Intel's matrix tiles for bfloat16: registers of 16 rows of 64 bytes, C[16][16] += A[16][32] B[32][16].
//
// B's rows are pairs: element [i][lane] holds two numbers, of k = 2 i and 2 i + 1. Pairs may be any two as long as A has
// them in the same order; walked rows are paired as (r, 16 + r).
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

/// bfloat16 rows, padded with zeros: [count to the next multiple of 32][Dp].
template <int D, int Dp>
SPLAT_INLINE void pack_row_major(const bfloat16* from, int64_t position, int64_t first, int64_t step, int count,
                                 bfloat16* to) {
  const bfloat16* row = from + first * position;
  for (int n = 0; n < count; ++n, row += step * position, to += Dp) {
    memcpy(to, row, D * sizeof *to);
    if constexpr (Dp > D) memset(to + D, 0, (Dp - D) * sizeof *to);
  }
  if (const int rest = -count & 31) memset(to, 0, (size_t)rest * Dp * sizeof *to);
}

/// B tiles of lanes: [group][Dp / 32] tiles whose element [i][lane] holds d = 32 n + 2 i and the next.
template <int D, int Dp>
SPLAT_INLINE void lanes_to_tiles(const bfloat16* from, int64_t position, const LaneRows& rows, char* tiles) {
  for (int group = 0; group < kGroups; ++group) {
    for (int d = 0; d < Dp; d += 32, tiles += kTileBytes) {
      Vec<float> square[16];
      SPLAT_UNROLL
      for (int n = 0; n < 16; ++n) {
        const int32_t at = rows.at[group * kGroup + n];
        alignas(64) bfloat16 part[32] = {};
        if (at < 0) square[n] = Vec<float>{};
        else if (d + 32 <= D) memcpy(&square[n], from + at * position + d, 64);
        else memcpy(part, from + at * position + d, (D - d) * sizeof *part), memcpy(&square[n], part, 64);
      }
      transpose<float>(square);
      SPLAT_UNROLL
      for (int n = 0; n < 16; ++n) memcpy(tiles + n * 64, &square[n], 64);
    }
  }
}

/// A tiles of 32 packed rows, transposed: [Dp / 16] tiles; element [d][2 r], [d][2 r + 1] of rows r, 16 + r.
/// Returns whether all of them are finite.
template <int Dp> SPLAT_INLINE bool pack_transposed(const bfloat16* packed, char* tiles) {
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint16_t Halves __attribute__((vector_size(64)));
  Halves largest = {};  // magnitude
  for (int d = 0; d < Dp; d += 16, tiles += kTileBytes) {
    Vec<float> square[16];
    SPLAT_UNROLL
    for (int r = 0; r < 16; ++r) {
      Half a, b;
      memcpy(&a, packed + r * Dp + d, sizeof a);
      memcpy(&b, packed + (16 + r) * Dp + d, sizeof b);
      const Vec<uint32_t> low = __builtin_convertvector(a, Vec<uint32_t>);
      const Vec<uint32_t> high = __builtin_convertvector(b, Vec<uint32_t>) << 16;
      square[r] = bits_as<Vec<float>>(low | high);
      const Halves magnitude = bits_as<Halves>(square[r]) & 0x7fff;
      largest = largest > magnitude ? largest : magnitude;
    }
    transpose<float>(square);
    SPLAT_UNROLL
    for (int n = 0; n < 16; ++n) memcpy(tiles + n * 64, &square[n], 64);
  }
  return !any<float>(bits_as<Vec<int32_t>>((Halves)(largest >= 0x7f80)));
}

}  // namespace splat
