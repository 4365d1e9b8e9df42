"""Units of work on threads: each once, whatever the pool does; subnormals flushed inside, kept outside."""

from __future__ import annotations

import ctypes

import pytest

from splat.codegen.cpp import compiler

pytestmark = pytest.mark.skipif(
    compiler.missing() is not None, reason=f"nothing can be compiled here: {compiler.missing()}"
)

SOURCE = r"""
#include "splat/threads.hpp"
#include <string.h>

using namespace splat;

static int64_t run(Pool& pool, int64_t units, int64_t least) {
  auto* hits = (int32_t*)calloc(units + 1, sizeof(int32_t));
  parallel_runs(pool, units, least, [&](int64_t from, int64_t to) {
    const bool short_run = to - from < least && to < units;
    for (int64_t unit = from; unit < to; ++unit) {
      const size_t size = 64 + 37 * (unit % 301);
      auto* memory = (char*)scratch(size);
      if ((uintptr_t)memory % 4096) abort();
      memset(memory, (int)unit, size);
      volatile float small = 1e-39f, flushed = small * 1.0f;
      const bool right = flushed == 0 && memory[size - 1] == (char)unit && !short_run;
      __atomic_fetch_add(&hits[unit], right, __ATOMIC_RELAXED);
    }
  });
  int64_t once = 0;
  for (int64_t unit = 0; unit < units; ++unit) once += hits[unit] == 1;
  free(hits);
  volatile float small = 1e-39f, kept = small * 1.0f;
  return kept == 0 ? -1 : once;
}

// Tasks that are kept, to be run by `late` when their loop is long over.
static void (*tasks[64])(void*);
static void* data[64];
static int num_tasks;
static bool keep(void*, void (*task)(void*), void* given) {
  tasks[num_tasks] = task, data[num_tasks++] = given;
  return true;
}
static bool refuse(void*, void (*)(void*), void*) { return false; }

extern "C" __attribute__((visibility("default"))) int64_t own(int num_threads, int64_t units, int64_t least) {
  Pool pool = own_threads(num_threads);
  return run(pool, units, least);
}
extern "C" __attribute__((visibility("default"))) int64_t late(int num_threads, int64_t units, int64_t least) {
  Pool pool = {num_threads, keep, nullptr, nullptr};
  const int64_t once = run(pool, units, least);
  const int kept = num_tasks;
  while (num_tasks) --num_tasks, tasks[num_tasks](data[num_tasks]);
  return kept * 1000000 + once;
}
extern "C" __attribute__((visibility("default"))) int64_t alone(int num_threads, int64_t units, int64_t least) {
  Pool pool = {num_threads, refuse, nullptr, nullptr};
  return run(pool, units, least);
}
"""


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    library = compiler.load("threads", SOURCE)
    for name in ("own", "late", "alone"):
        getattr(library, name).restype = ctypes.c_int64
        getattr(library, name).argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return library


@pytest.mark.parametrize("least", [0, 1, 4], ids="runs_of_{}".format)
@pytest.mark.parametrize("units", [0, 1, 2, 7, 5000])
def test_each_unit_once(library: ctypes.CDLL, units: int, least: int) -> None:
    """One by one, or in runs of at least so many but for the last."""
    for num_threads in (-1, 0, 1, 2, 3, 16):
        assert library.own(num_threads, units, least) == units
        assert library.alone(num_threads, units, least) == units, "a pool that takes no task"


def test_often(library: ctypes.CDLL) -> None:
    """Threads that come when the last unit is taken, and others that come before the first."""
    assert all(library.own(4, n % 9, n % 3) == n % 9 for n in range(2000))


def test_a_task_that_comes_late_finds_nothing_to_do(library: ctypes.CDLL) -> None:
    """And nobody waits for it: at most one helper for each unit but the caller's."""
    assert library.late(8, 5000, 0) == 7 * 1000000 + 5000
    assert library.late(8, 5000, 4) == 7 * 1000000 + 5000
    assert library.late(8, 3, 0) == 2 * 1000000 + 3
    assert library.late(8, 1, 0) == 1
    assert library.late(1, 100, 0) == 100


def test_kernels_share_a_threads_memory() -> None:
    if "clang" in compiler.find().version.lower():
        pytest.skip("with clang each library has its own")
    text = '#include "splat/threads.hpp"\nextern "C" __attribute__((visibility("default"))) void* memory() {\n'
    libraries = [
        compiler.load(f"memory_{size}", text + f"  return splat::scratch({size});\n}}\n") for size in (5000, 64)
    ]
    for library in libraries:
        library.memory.restype = ctypes.c_void_p
    first, second = (library.memory() for library in libraries)
    assert first == second
