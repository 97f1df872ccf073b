// CUDA on a CPU, for tests: runs a kernel of kernels/cuda one block after another. Here is the machine as its
// instructions see it; scheduler.h runs the threads.
//
// Each CUDA thread is a fiber with its own stack. A warp's threads meet at shuffles, mma and the like:
// the last to arrive computes the result for all 32. The order of blocks, warps and lanes is random and
// unkind: a warp may run far ahead of the others before they start (`seed` decides). Shared memory
// begins as NaN, and asynchronous copies are seen as late as the program allows. A program that is
// wrong on some card for lack of a barrier should give wrong numbers or a message here.
//
// What it cannot show: races in global memory between blocks, the memory model, speed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace emu {

constexpr int kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;
constexpr int kMaxCopies = 256;  // asynchronous copies of a thread in flight

struct Extent {
  unsigned x, y, z;
};

// A place in the kernel's source, told in messages.
struct Site {
  const char* name;
  const char* file;
  int line;
  bool operator==(const Site& o) const { return line == o.line && !strcmp(name, o.name); }
};

struct Copy {
  char* to;
  const char* from;  // null: zeros
  int n_bytes;
};

enum class State { kReady, kWarp, kBlock, kUntil, kDone };

struct Thread {
  ucontext_t context;
  jmp_buf resume;
  bool started;
  State state;
  Site site;                       // where it waits
  void* operands;                  // of the warp's operation
  bool (*is_over)(const Thread&);  // what it waits for in kUntil, of these two
  const void* subject;
  int parity;
  Extent index;
  Copy copies[kMaxCopies];
  int n_copies, n_groups, group_end[kMaxCopies];
};

// What else a card has beside its threads, and how much; kernels/emu/mbarrier.h is for such a card.
struct Card {
  unsigned max_shared;        // of a block
  unsigned shared_alignment;  // of its first byte
  void (*begin)();            // of a block
  bool (*step)();             // ends something that runs beside the threads; false: there is nothing
  void (*end)();              // of a block
};
static Card card = {99 * 1024, 128, [] {}, [] { return false; }, [] {}};  // sm_86 and sm_89

// The machine. Static, so that each compiled kernel has its own; one run at a time.
struct Machine {
  Thread* threads;
  char *stacks, *arena, *shared;
  size_t arena_bytes;
  unsigned shared_bytes;
  int n_threads, current;
  Extent grid, block, block_index;
  void (*body)(const void*);
  const void* arguments;
  jmp_buf scheduler, failure;
  uint64_t random;
  unsigned eagerness;       // a warp gives way to another after 1 of this many operations; 0: never
  char* message;
  size_t message_size;
  unsigned long long bank_conflicts;
};
static Machine m;

[[noreturn]] [[gnu::format(printf, 1, 2)]] static void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(m.message, m.message_size, format, list);
  va_end(list);
  _longjmp(m.failure, 1);
}

static unsigned draw(unsigned below) {  // Marsaglia 2003, xorshift64
  m.random ^= m.random << 13;
  m.random ^= m.random >> 7;
  m.random ^= m.random << 17;
  return static_cast<unsigned>((m.random >> 32) % below);
}

static void shuffle(int* order, int n) {
  for (int i = 0; i < n; i++) order[i] = i;
  for (int i = n - 1; i > 0; i--) {
    const int j = draw(i + 1), t = order[i];
    order[i] = order[j], order[j] = t;
  }
}

inline Thread& self() { return m.threads[m.current]; }
inline int lane() { return m.current % kLanes; }
inline Thread* warp() { return m.threads + m.current / kLanes * kLanes; }

static void wait(State state, const Site& site) {
  Thread& me = self();
  me.state = state, me.site = site;
  if (!_setjmp(me.resume)) _longjmp(m.scheduler, 1);
}

// All threads of the block meet. A thread that has returned never arrives: an error here.
static void block_barrier(const Site& site) { wait(State::kBlock, site); }

// All 32 lanes of the warp meet; the last to come runs `apply` on everyone's operands.
static void meet(const Site& site, void* operands, void (*apply)(void* const operands[kLanes])) {
  Thread* w = warp();
  self().operands = operands;
  void* all[kLanes];
  for (int i = 0; i < kLanes; i++) {
    if (i != lane() && w[i].state != State::kWarp) return wait(State::kWarp, site);
    all[i] = w[i].operands;
  }
  for (int i = 0; i < kLanes; i++)
    if (i != lane() && !(w[i].site == site))
      fail("%s:%d: lane %d is at %s, lane %d at %s of line %d", site.file, site.line, lane(), site.name,
           i, w[i].site.name, w[i].site.line);
  apply(all);
  for (int i = 0; i < kLanes; i++) w[i].state = State::kReady;
}

static void check_shared(const void* p, int n_bytes, const char* what) {
  const char* c = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % n_bytes)
    fail("%s: shared address is not a multiple of %d", what, n_bytes);
  if (c < m.shared || c + n_bytes > m.shared + m.shared_bytes)
    fail("%s: byte %td of %u of shared memory", what, c - m.shared, m.shared_bytes);
}

}  // namespace emu
