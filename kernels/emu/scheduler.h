// Who of the emulator's threads goes on, and what runs a kernel: fibers, random orders, faults, blocks.
#pragma once
#include <signal.h>
#include <sys/mman.h>

#include "emu.h"

namespace emu {

constexpr size_t kStack = 256 * 1024, kPage = 4096;

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
