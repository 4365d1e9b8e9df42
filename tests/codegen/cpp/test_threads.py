"""Units of work on threads: each once, whatever the pool does; subnormals flushed inside, kept outside."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

import splat
from splat.codegen.base import Options
from splat.codegen.cpp import compiler, generate
from splat.codegen.cpp.emit import kernels_of
from splat.codegen.cpp.lower import passes_of
from splat.planning import Problem, make_plan
from tests.attention_suite import draw_inputs

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


# -- a kernel without XLA ----------------------------------------------------------------------------------------------


class Array(ctypes.Structure):
    """`splat::Array`."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "position", "head")))

    @classmethod
    def of(cls, array: np.ndarray) -> Array:
        strides = [stride // array.itemsize for stride in array.strides]
        return cls(array.ctypes.data, *strides[:3])


class Call(ctypes.Structure):
    """`splat::Call`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "q_len", "kv_len", "num_q_heads", "num_kv_heads")),
        ("scale", ctypes.c_double), ("soft_cap", ctypes.c_double),
        *((name, Array) for name in ("query", "key", "value", "out", "d_out", "lse", "d_lse", "d_query", "d_key")),
        ("d_value", Array), ("kv_lengths", ctypes.c_void_p), ("tables", ctypes.c_void_p),
        ("num_groups", ctypes.c_void_p),
    )  # fmt: skip


@pytest.mark.parametrize("num_threads", [1, 3])
def test_run_without_xla(rng: np.random.Generator, num_threads: int) -> None:
    """Arrays with strides of their own: [batch, head, position, head dim], as PyTorch has them."""
    pattern = splat.parse("window(9) | strided(7)")
    plan = make_plan(Problem(pattern, 90, 90, 16, 4, 2, 2), implementation="cpp")
    (facts,) = kernels_of(plan, Options(0.25), "forward")
    library = compiler.load("forward_float32_h16", generate.source(facts))
    inputs = draw_inputs(rng, 90, 90, batch=2, heads=(4, 2), head_dim=16)
    q, k, v = (np.ascontiguousarray(np.swapaxes(x, 1, 2)).swapaxes(1, 2) for x in inputs[:3])
    out, lse = np.full_like(q, np.nan), np.full(q.shape[:3], np.nan, np.float32)
    _, tables = passes_of(plan, "forward")
    flat = [np.ascontiguousarray(table) for one in tables for table in one]
    pointers = (ctypes.c_void_p * len(flat))(*(table.ctypes.data for table in flat))
    counts = (ctypes.c_int64 * len(tables))(*(len(one[0]) for one in tables))
    call = Call(2, 90, 90, 4, 2, 0.25, 0.0, Array.of(q), Array.of(k), Array.of(v), Array.of(out))
    call.lse = Array.of(lse)
    call.tables, call.num_groups = ctypes.addressof(pointers), ctypes.addressof(counts)
    assert library.splat_run(ctypes.byref(call), num_threads, None) == 0
    wanted = splat.attention(*inputs[:3], pattern, implementation="xla", return_lse=True)
    np.testing.assert_allclose(out, wanted[0], atol=2e-6)
    np.testing.assert_allclose(lse, wanted[1], atol=2e-6)
