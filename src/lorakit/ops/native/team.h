// How the threads of a step share its work, part after part.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lorakit {

// OpenMP's own loops put a thread that waits to sleep as soon as the process has more threads than there are cores, as every
// server has; to wake it takes longer than most parts of a step. These look for a while before they step aside.
class Team {
 public:
  explicit Team(int threads) : threads_(threads) {}

  // Call `body(i)` for 0 to `count`, each once, by whoever is free. All threads have to call this; each goes on when all is
  // done.
  template <class Body>
  void each(int64_t count, const Body& body) {
    for (int64_t i = take(); i < count; i = take()) body(i);
    meet();
  }

  // The same for `jobs_of(p)` jobs of each of `parts` parts: `body(p, job)`.
  template <class Jobs, class Body>
  void each_of(int64_t parts, const Jobs& jobs_of, const Body& body) {
    int64_t jobs = 0;
    for (int64_t p = 0; p < parts; ++p) jobs += jobs_of(p);
    if (jobs == 0) return;  // the same for all threads
    each(jobs, [&](int64_t job) {
      int64_t p = 0;
      for (; job >= jobs_of(p); ++p) job -= jobs_of(p);
      body(p, job);
    });
  }

 private:
  static constexpr int64_t LOOKS = 1 << 14;

  int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }

  void meet() {
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int64_t looks = 0; round_.load(std::memory_order_acquire) == round; ++looks) {
      if (looks >= LOOKS)
        std::this_thread::yield();
      else
        rest();
    }
  }

  // Leave the core to its other thread, if it has one, for a moment.
  static void rest() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int threads_;
  // Each in a line of its own: who looks at one is not disturbed by who counts another.
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

}  // namespace lorakit
