"""Two small C++ programs: what the processor can do at best, and a call from JAX that does nothing."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from splat.codegen.cpp import compiler

#: Milliseconds that one measurement of the rate takes, about.
RATE_MS = 1.5

_RATE = r"""
// The rate of a micro-kernel fed from the first-level cache, 6 rows x 4 vectors and 64 steps, on all threads at once.
// Threads take small pieces of work from a counter, as attention does, so that a slow one holds up nobody.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kFloats = 16, kRows = 6, kVectors = 4;
#elif defined(__AVX__)
constexpr int kFloats = 8, kRows = 6, kVectors = 2;
#else
constexpr int kFloats = 4, kRows = 4, kVectors = 2;
#endif
constexpr int kSteps = 64, kPiece = 100;
typedef float Vector __attribute__((vector_size(4 * kFloats)));

struct alignas(64) Data {
  Vector queries[kSteps][kVectors];
  float keys[kRows][kSteps];
};

static __attribute__((noinline)) float piece(const Data& data) {
  Vector sums[kRows][kVectors] = {};
  for (int repeat = 0; repeat < kPiece; ++repeat) {
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        Vector key = data.keys[row][step] - Vector{};
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[row][v] += key * data.queries[step][v];
      }
    }
    asm volatile("" ::: "memory");
  }
  Vector sum = {};
#pragma GCC unroll 8
  for (auto& row : sums)
#pragma GCC unroll 8
    for (auto& one : row) sum += one;
  return sum[0];
}

static volatile float sink;

/// GFLOP/s of so many pieces.
extern "C" __attribute__((visibility("default"))) double rate(int num_threads, long pieces) {
  std::atomic<int> waiting(num_threads);
  std::atomic<long> left(pieces);
  using Clock = std::chrono::steady_clock;
  Clock::time_point begin;
  auto run = [&] {
    Data data;
    float* all = (float*)&data;
    for (unsigned n = 0; n < sizeof(Data) / 4; ++n) all[n] = (int)(n * 2654435761u) * 0x1p-31f;  // in [-1, 1)
    sink = piece(data);
    if (waiting.fetch_sub(1) == 1) begin = Clock::now(), waiting = -1;
    while (waiting >= 0) std::this_thread::yield();
    while (left.fetch_sub(1) > 0) sink = piece(data);
  };
  std::vector<std::thread> threads;
  for (int n = 1; n < num_threads; ++n) threads.emplace_back(run);
  run();
  for (auto& thread : threads) thread.join();
  double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  return 2.0 * kFloats * kRows * kVectors * kSteps * kPiece * pieces / seconds / 1e9;
}

extern "C" __attribute__((visibility("default"))) double piece_flops() {
  return 2.0 * kFloats * kRows * kVectors * kSteps * kPiece;
}
"""

_EMPTY = r"""
#include "xla/ffi/api/c_api.h"

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* empty(XLA_FFI_CallFrame* frame) {
  for (auto* one = frame->extension_start; one; one = one->next) {
    if (one->type != XLA_FFI_Extension_Metadata) continue;
    auto& version = ((XLA_FFI_Metadata_Extension*)one)->metadata->api_version;
    version.major_version = XLA_FFI_API_MAJOR;
    version.minor_version = XLA_FFI_API_MINOR;
    ((XLA_FFI_Metadata_Extension*)one)->metadata->traits = 0;
  }
  return nullptr;
}
"""


@functools.cache
def _rate() -> tuple[Any, int]:
    """(GFLOP/s of (threads, pieces), pieces that take about `RATE_MS` on two threads)."""
    library = compiler.load("bench_rate", _RATE)
    library.rate.restype = library.piece_flops.restype = ctypes.c_double
    library.rate.argtypes = (ctypes.c_int, ctypes.c_long)
    flops = library.piece_flops()
    gflops = sorted(library.rate(2, 200) for _ in range(9))[4]
    return library.rate, max(int(RATE_MS * 1e6 * gflops / flops), 8)


def rate_gflops(threads: int) -> float:
    """float32 GFLOP/s of an L1-fed micro-kernel on so many threads, measured now."""
    function, pieces = _rate()
    return function(threads, pieces)


@functools.cache
def empty_target() -> str:
    """The name by which JAX calls a function that does nothing, whatever its operands and results."""
    import jax

    library = compiler.load("bench_empty", _EMPTY)
    name = "splat_benchmark_empty"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library.empty), platform="cpu")
    return name
