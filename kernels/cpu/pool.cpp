// The threads of pool.h. Built as C++20 for atomics that can be waited for.
#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>

namespace tinyllm {
namespace {

constexpr int kPause = 1 << 12;      // looks at a barrier before sleeping, about 60 us
constexpr int kIdlePause = 1 << 14;  // looks for new work, about 0.2 ms: longer than Python needs between tokens

using Clock = std::chrono::steady_clock;
constexpr Clock::duration kLate = std::chrono::milliseconds(1);  // a scheduler's slice is longer
constexpr Clock::duration kShortest = std::chrono::milliseconds(10), kLongest = std::chrono::milliseconds(320);

// Looks `times` times, then sleeps, until `value` is no longer `old`.
int changed(std::atomic<int>& value, int old, int times) {
  for (int i = 0; i < times; ++i) {
    const int now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    __builtin_ia32_pause();
  }
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

// Never destroyed: its threads may be asleep in it when the process ends.
struct Pool {
  std::mutex busy;
  Barrier barrier;
  alignas(64) std::atomic<int> order{0};  // number of the job, then its threads in the last 8 bits
  Work work = nullptr;
  void* context = nullptr;
  int n_workers = 0;
  Clock::time_point alone_until{};
  Clock::duration pause = kShortest;
  const pid_t process = getpid();

  void serve(int thread, int seen) {
    for (;;) {
      seen = changed(order, seen, kIdlePause);
      const int size = seen & kMaxThreads;
      if (thread >= size) continue;
      work(context, Team{thread, size, &barrier});
      barrier.meet(size);
    }
  }

  void run(int size) {
    const int before = order.load(std::memory_order_relaxed);
    for (; n_workers < size - 1; ++n_workers)
      std::thread(&Pool::serve, this, n_workers + 1, before).detach();
    order.store(static_cast<int>(((static_cast<unsigned>(before) >> 8) + 1) << 8) | size, std::memory_order_release);
    order.notify_all();
    work(context, Team{0, size, &barrier});
    barrier.meet(size);
    const bool late = barrier.was_late();
    if (late) alone_until = Clock::now() + pause;
    pause = late ? std::min(2 * pause, kLongest) : kShortest;
  }
};

// The pool of this process; a forked child has no threads and starts with a new one.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* known = current.load(std::memory_order_acquire);
  if (known != nullptr && known->process == getpid()) return *known;
  auto* fresh = new Pool;
  if (current.compare_exchange_strong(known, fresh)) return *fresh;
  delete fresh;
  return *known;
}

}  // namespace

void Barrier::meet(int size) {
  const int round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    arrived_.store(0, std::memory_order_relaxed);
    for (int i = 0; i < size; ++i) taken_[i].count.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    round_.notify_all();
  } else {
    const Clock::time_point started = Clock::now();
    changed(round_, round, kPause);
    if (Clock::now() - started > kLate) late_.store(true, std::memory_order_relaxed);
  }
}

void run_team(int threads, Work work, void* context) {
  const int size = threads < 1 ? 1 : threads > kMaxThreads ? kMaxThreads : threads;
  if (size > 1) {
    Pool& all = pool();
    if (const std::unique_lock<std::mutex> lock{all.busy, std::try_to_lock};
        lock && Clock::now() >= all.alone_until) {
      all.work = work;
      all.context = context;
      return all.run(size);
    }
  }
  work(context, Team{0, 1, nullptr});
}

}  // namespace tinyllm
