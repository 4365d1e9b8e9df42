// Threads: units of work from one counter, on whatever threads there are.
//
//     counter   0 1 2 3 4 5 6 ...        the caller and its helpers each take what comes next until there is none
//     caller    0 . 2 . . 5 ....wait     and waits for units that others have begun, never for helpers that have not:
//     helper      1 . 3 4 . 6            a helper that comes late finds nothing to do
//
// Threads come from XLA's pool (ffi.hpp), are an OpenMP runtime's team, or are made for the call; there may be none.
#pragma once
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

namespace splat {

/// `GOMP_parallel` of an OpenMP runtime: task(data) on so many threads at once, the caller's among them.
using Team = void (*)(void (*task)(void*), void* data, unsigned num_threads, unsigned flags);

/// Where helpers come from.
struct Pool {
  int num_threads;  // the caller counted
  /// Has task(data) run by another thread, now or later; false where it will not be. Not asked of a pool of one.
  bool (*schedule)(void* context, void (*task)(void*), void* data);
  void* context;
  Team team;  // instead of `schedule`, where it is
};

/// While it lives, this thread takes and makes 0 for subnormal numbers, which are many times slower than others.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() {
    asm volatile("stmxcsr %0" : "=m"(before_));
    const uint32_t flushing = before_ | 0x8040;  // FTZ, DAZ
    asm volatile("ldmxcsr %0" : : "m"(flushing) : "memory");
  }
  ~FlushSubnormals() { asm volatile("ldmxcsr %0" : : "m"(before_) : "memory"); }

 private:
  uint32_t before_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t)1 << 24) : "memory");  // FZ
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_) : "memory"); }

 private:
  uint64_t before_;
#else
  FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
};

/// What this thread has stored past the caches becomes visible before what it stores from here on.
inline void arrive() {
#if defined(__x86_64__)
  asm volatile("sfence" ::: "memory");
#endif
}

/// How many units are taken at once: one, or where neighbours are better done by one thread (`least` > 0) so many and
/// more, a part of what is left.
inline int64_t taken_at_once(int64_t left, int64_t least, int64_t threads) {
  if (!least) return 1;
  const int64_t part = left / (2 * threads), some = part > least ? part : least;
  return some < left ? some : left;
}

/// One parallel loop. It outlives the call: the last thread that knows it frees it.
struct Parallel {
  int64_t next, done;  // units taken, units finished
  int64_t units, least, threads;
  int32_t users;
  void (*run)(const void* body, int64_t from, int64_t to);
  const void* body;  // the caller's: there while a unit is unfinished
  pthread_mutex_t mutex;
  pthread_cond_t finished;

  void take_part() {
    FlushSubnormals flush;
    int64_t mine = 0;
    for (int64_t from = __atomic_load_n(&next, __ATOMIC_RELAXED); from < units;) {
      const int64_t to = from + taken_at_once(units - from, least, threads);
      if (!__atomic_compare_exchange_n(&next, &from, to, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
      run(body, from, to);
      mine += to - from;
      from = __atomic_load_n(&next, __ATOMIC_RELAXED);
    }
    arrive();
    if (mine && __atomic_add_fetch(&done, mine, __ATOMIC_ACQ_REL) == units) {
      pthread_mutex_lock(&mutex);
      pthread_cond_broadcast(&finished);
      pthread_mutex_unlock(&mutex);
    }
  }

  bool is_done() { return __atomic_load_n(&done, __ATOMIC_ACQUIRE) == units; }

  void wait() {
    for (int n = 0; n < 2000 && !is_done(); ++n) {  // units are short
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    if (is_done()) return;
    pthread_mutex_lock(&mutex);
    while (!is_done()) pthread_cond_wait(&finished, &mutex);
    pthread_mutex_unlock(&mutex);
  }

  void leave() {
    if (__atomic_sub_fetch(&users, 1, __ATOMIC_ACQ_REL)) return;
    pthread_cond_destroy(&finished);
    pthread_mutex_destroy(&mutex);
    free(this);
  }

  static void help(void* self) {
    ((Parallel*)self)->take_part();
    ((Parallel*)self)->leave();
  }
};

/// `parallel_runs` without its type.
inline void run_units(Pool& pool, int64_t units, int64_t least, void (*run)(const void*, int64_t, int64_t),
                      const void* body) {
  const int64_t threads = pool.num_threads < units ? pool.num_threads : units;
  const Parallel begin = {
      0, 0, units, least, threads, 1, run, body, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER};
  if (threads > 1 && pool.team) {
    Parallel loop = begin;  // everyone has left it when the team is done
    return pool.team([](void* loop) { ((Parallel*)loop)->take_part(); }, &loop, (unsigned)threads, 0);
  }
  auto* loop = threads > 1 ? (Parallel*)malloc(sizeof(Parallel)) : nullptr;
  if (!loop) {
    FlushSubnormals flush;
    if (units > 0) run(body, 0, units);
    arrive();
    return;
  }
  *loop = begin;
  for (int64_t n = 1; n < threads; ++n) {
    __atomic_add_fetch(&loop->users, 1, __ATOMIC_RELAXED);
    if (pool.schedule(pool.context, Parallel::help, loop)) continue;
    __atomic_sub_fetch(&loop->users, 1, __ATOMIC_RELAXED);
    break;
  }
  loop->take_part();
  loop->wait();
  loop->leave();
}

/// body(from, to) for all units below `units`, each in one of the runs [from, to), in no order, on the caller and on
/// the pool's threads. Runs are of `least` units and more, but for the last one; 0: of one.
template <class Body> void parallel_runs(Pool& pool, int64_t units, int64_t least, Body&& body) {
  auto* run = +[](const void* given, int64_t from, int64_t to) {
    (*(decltype(&body))const_cast<void*>(given))(from, to);
  };
  run_units(pool, units, least, run, &body);
}

/// body(unit) for every unit below `units`, each once, in no order, on the caller and on the pool's threads.
template <class Body> void parallel_for(Pool& pool, int64_t units, Body&& body) {
  parallel_runs(pool, units, 0, [&](int64_t from, int64_t to) {
    for (int64_t unit = from; unit < to; ++unit) body(unit);
  });
}

/// A team's threads, or else some that are made for each loop and end with it, fewer where the system gives no more.
inline Pool own_threads(int num_threads, Team team = nullptr) {
  auto schedule = [](void*, void (*task)(void*), void* data) {
    struct Start {
      void (*task)(void*);
      void* data;
    };
    auto* start = (Start*)malloc(sizeof(Start));
    if (!start) return false;
    *start = {task, data};
    auto main = [](void* given) -> void* {
      const Start start = *(Start*)given;
      free(given);
      start.task(start.data);
      return nullptr;
    };
    pthread_t thread;
    if (pthread_create(&thread, nullptr, main, start)) {
      free(start);
      return false;
    }
    pthread_detach(thread);
    return true;
  };
  return {num_threads < 1 ? 1 : num_threads, schedule, nullptr, team};
}

/// Memory of one thread: kept from call to call, freed when the thread ends.
class Arena {
 public:
  void* get(size_t bytes) {
    if (bytes <= size_) return data_;
    free(data_);
    size_ = (bytes + 4095) / 4096 * 4096;
    data_ = nullptr;
    if (posix_memalign(&data_, 4096, size_)) {
      fprintf(stderr, "splat: out of memory: %zu bytes for a thread of a kernel\n", bytes);
      abort();
    }
    return data_;
  }
  ~Arena() { free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

/// A thread's memory for all kernels: gcc gives a variable that is visible to the whole process once, whatever
/// libraries have it; with other compilers each library has its own.
__attribute__((visibility("default"))) inline thread_local Arena arena_of_thread;

/// At least `bytes` of memory for this thread, at a page's boundary, whatever it holds. The next call may take it back.
inline void* scratch(size_t bytes) { return arena_of_thread.get(bytes); }

}  // namespace splat
