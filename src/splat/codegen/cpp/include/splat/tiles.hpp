// The instructions for matrix tiles: eight registers of 16 rows of 64 bytes.
//
// Written with assembly, because gcc 12's intrinsics do not say which memory they read and write.
#pragma once
#include "splat/vector.hpp"

namespace splat {

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

}  // namespace splat
