// CUDA on a CPU, for tests: runs a kernel of kernels/cuda one block after another.
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
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace emu {

constexpr int kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;
constexpr size_t kStack = 256 * 1024, kPage = 4096;
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

// ---- the scheduler ----

static void enter() {
  m.body(m.arguments);
  self().state = State::kDone;
  _longjmp(m.scheduler, 1);
}

static void resume(int thread) {
  m.current = thread;
  Thread& t = m.threads[thread];
  if (_setjmp(m.scheduler)) return;
  if (t.started) _longjmp(t.resume, 1);
  t.started = true;
  getcontext(&t.context);
  t.context.uc_stack = {};
  t.context.uc_stack.ss_sp = m.stacks + kStack * thread;
  t.context.uc_stack.ss_size = kStack;
  makecontext(&t.context, enter, 0);
  setcontext(&t.context);
}

static bool is_ready(int warp) {
  bool any = false;
  for (int i = 0; i < kLanes; i++) {
    Thread& t = m.threads[warp * kLanes + i];
    if (t.state == State::kUntil && t.is_over(t)) t.state = State::kReady;
    any |= t.state == State::kReady;
  }
  return any;
}

// Runs a warp until all its lanes wait for other warps, or until it gives way.
static void run_warp(int warp) {
  int order[kLanes];
  shuffle(order, kLanes);
  do {
    for (int i = 0; i < kLanes; i++) {
      const int thread = warp * kLanes + order[i];
      if (m.threads[thread].state == State::kReady) resume(thread);
    }
    if (m.eagerness && draw(m.eagerness) == 0) return;
  } while (is_ready(warp));
}

// No thread can run: either all are at one barrier of the block, or it will never go on.
static void open_barrier() {
  const Thread& first = m.threads[0];
  for (int i = 0; i < m.n_threads; i++) {
    const Thread& t = m.threads[i];
    if (t.state == State::kBlock && first.state == State::kBlock && t.site == first.site) continue;
    const Thread& waiting = t.state == State::kDone ? first : t;
    const Thread& other = t.state == State::kDone ? t : first;
    const int a = t.state == State::kDone ? 0 : i, b = t.state == State::kDone ? i : 0;
    if (other.state == State::kDone)
      fail("thread %d waits for ever at %s (%s:%d): thread %d has returned", a, waiting.site.name,
           waiting.site.file, waiting.site.line, b);
    fail("thread %d waits for ever at %s (%s:%d): thread %d is at %s (line %d)", a, waiting.site.name,
         waiting.site.file, waiting.site.line, b, other.site.name, other.site.line);
  }
  for (int i = 0; i < m.n_threads; i++) m.threads[i].state = State::kReady;
}

static void run_block() {
  card.begin();
  memset(m.shared, 0xff, m.shared_bytes);  // NaN as fp32, bf16, fp16; -1 as integers
  for (int i = 0; i < m.n_threads; i++) {
    Thread& t = m.threads[i];
    t.started = false, t.state = State::kReady, t.n_copies = t.n_groups = 0;
    t.index = {i % m.block.x, i / m.block.x % m.block.y, i / m.block.x / m.block.y};
  }
  const int n_warps = m.n_threads / kLanes;
  for (;;) {
    int ready[kMaxWarps], n = 0, n_done = 0;
    for (int w = 0; w < n_warps; w++)
      if (is_ready(w)) ready[n++] = w;
    for (int i = 0; i < m.n_threads; i++) n_done += m.threads[i].state == State::kDone;
    if (n_done == m.n_threads) return card.end();
    if ((n == 0 || (m.eagerness && draw(m.eagerness) == 0)) && card.step()) continue;
    if (n) {
      run_warp(ready[draw(n)]);
      continue;
    }
    open_barrier();
  }
}

static void on_fault(int, siginfo_t* info, void*) {
  const char* p = static_cast<char*>(info->si_addr);
  if (p >= m.arena - kPage && p < m.arena + m.arena_bytes + kPage)
    fail("thread %d: byte %td of %u of shared memory", m.current, p - m.shared, m.shared_bytes);
  fail("thread %d reads or writes address %p", m.current, info->si_addr);
}

static char* pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<char*>(p);
}

static void run_blocks() {
  const uint64_t n = uint64_t{1} * m.grid.x * m.grid.y * m.grid.z;
  const uint64_t start = draw(static_cast<unsigned>(n)), backwards = draw(2);
  for (uint64_t i = 0; i < n; i++) {  // forwards or backwards from anywhere
    const uint64_t b = (start + (backwards ? n - i : i)) % n;
    m.block_index = {static_cast<unsigned>(b % m.grid.x), static_cast<unsigned>(b / m.grid.x % m.grid.y),
                     static_cast<unsigned>(b / m.grid.x / m.grid.y)};
    run_block();
  }
}

// What Python calls: extents {grid x, y, z, block x, y, z}. Returns 0, or 1 with a message.
static int run(void (*body)(const void*), int max_threads, const void* arguments, const unsigned* extents,
               unsigned shared_bytes, uint64_t seed, char* message, size_t message_size) {
  static Thread threads[kMaxThreads];
  m = {};
  m.threads = threads, m.body = body, m.arguments = arguments;
  m.message = message, m.message_size = message_size;
  m.grid = {extents[0], extents[1], extents[2]}, m.block = {extents[3], extents[4], extents[5]};
  m.n_threads = m.block.x * m.block.y * m.block.z;
  m.shared_bytes = shared_bytes;
  m.random = (seed + 1) * 0x9e3779b97f4a7c15ull;
  m.eagerness = seed % 3 == 0 ? 0 : seed % 3 == 1 ? 16 : 2;
  m.arena_bytes = card.max_shared + 13 * 1024;         // whole pages
  m.arena = pages(m.arena_bytes + 2 * kPage) + kPage;  // between two that fault
  mprotect(m.arena - kPage, kPage, PROT_NONE);
  mprotect(m.arena + m.arena_bytes, kPage, PROT_NONE);
  const unsigned whole = card.shared_alignment;
  m.shared = m.arena + m.arena_bytes - (shared_bytes + whole - 1) / whole * whole;
  memset(m.arena, 0xff, m.arena_bytes);
  m.stacks = pages(kStack * m.n_threads);
  struct sigaction ours = {}, old_segv, old_bus;
  ours.sa_sigaction = on_fault, ours.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &ours, &old_segv), sigaction(SIGBUS, &ours, &old_bus);
  const int failed = _setjmp(m.failure);
  if (!failed) {
    if (m.n_threads > max_threads || m.n_threads % kLanes || m.n_threads == 0)
      fail("%d threads: not a multiple of %d up to %d", m.n_threads, kLanes, max_threads);
    if (shared_bytes > card.max_shared)
      fail("%u bytes of shared memory, at most %u", shared_bytes, card.max_shared);
    if (m.grid.x == 0 || m.grid.y - 1 > 65534 || m.grid.z - 1 > 65534)
      fail("grid %u x %u x %u: x is at least 1, y and z 1 to 65535", m.grid.x, m.grid.y, m.grid.z);
    run_blocks();
  }
  sigaction(SIGSEGV, &old_segv, nullptr), sigaction(SIGBUS, &old_bus, nullptr);
  munmap(m.arena - kPage, m.arena_bytes + 2 * kPage);
  munmap(m.stacks, kStack * m.n_threads);
  return failed;
}

}  // namespace emu

// Extra turns that ldmatrix needed because rows lay in the same banks, in the last run.
extern "C" __attribute__((visibility("default"))) unsigned long long emu_bank_conflicts() {
  return emu::m.bank_conflicts;
}
