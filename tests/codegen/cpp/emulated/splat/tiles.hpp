// Matrix tiles without the instructions: found ahead of the kernels' own tiles.hpp, so that any processor runs them.
#pragma once
#include "splat/vector.hpp"

namespace splat {

struct EmulatedTile {
  char bytes[16][64];
};
inline EmulatedTile& emulated_tile(int tile) {
  static thread_local EmulatedTile tiles[8];
  return tiles[tile];
}

template <int tile> void tile_load(const void* from, int64_t row_bytes) {
  for (int row = 0; row < 16; ++row) memcpy(emulated_tile(tile).bytes[row], (const char*)from + row * row_bytes, 64);
}
template <int tile> void tile_store(void* to, int64_t row_bytes) {
  for (int row = 0; row < 16; ++row) memcpy((char*)to + row * row_bytes, emulated_tile(tile).bytes[row], 64);
}
template <int tile> void tile_zero() { memset(&emulated_tile(tile), 0, sizeof(EmulatedTile)); }

/// C[row][column] += A[row][2 k] * B[k][2 column] + A[row][2 k + 1] * B[k][2 column + 1].
template <int c, int a, int b> void tile_dot() {
  float sums[16][16];
  bfloat16 left[16][32], right[16][32];
  memcpy(sums, &emulated_tile(c), sizeof sums);
  memcpy(left, &emulated_tile(a), sizeof left);
  memcpy(right, &emulated_tile(b), sizeof right);
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 32; ++k)
      for (int column = 0; column < 16; ++column)
        sums[row][column] += to_compute(left[row][k]) * to_compute(right[k / 2][2 * column + k % 2]);
  memcpy(&emulated_tile(c), sums, sizeof sums);
}

/// What is left in the registers by others is no number.
struct Tiles {
  Tiles() {
    for (int tile = 0; tile < 8; ++tile) memset(&emulated_tile(tile), 0xff, sizeof(EmulatedTile));
  }
};

}  // namespace splat
