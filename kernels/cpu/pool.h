// Threads of our own that wait for work: they spin for a moment, then sleep until they are needed.
//
// A pass through a model has hundreds of short phases. OpenMP with passive waiting needs 5 to 10 us
// for each, with active waiting it keeps every core busy for nothing between two tokens.
#pragma once
#include <atomic>

namespace tinyllm {

// Where the threads of one job meet.
class Barrier {
 public:
  // Returns once `size` threads have called it; what each wrote before is visible to all after.
  void meet(int size);

  // Whether a thread has waited so long since the last call that another one had lost its core.
  bool was_late() { return late_.exchange(false, std::memory_order_relaxed); }

 private:
  std::atomic<bool> late_{false};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

// One thread's place in a job.
struct Team {
  int thread, size;
  Barrier* barrier;

  void meet() const {
    if (size > 1) barrier->meet(size);
  }

  // The share of `n` things that is this thread's: [first(n), first(n) + ...) up to the next one's.
  long begin(long n) const { return n * thread / size; }
  long end(long n) const { return n * (thread + 1) / size; }
};

using Work = void (*)(void* context, const Team& team);

// Runs work on `threads` threads, the caller among them, and returns when all are done. A second
// caller at the same time gets only its own thread: more would share the same cores. Where others
// take the cores the caller works alone for a while: a pass of 40 phases, each with a wait for a
// thread that is not running, took 40 ms on a machine with ten busy processes, 1 ms alone.
void run_team(int threads, Work work, void* context);

}  // namespace tinyllm
