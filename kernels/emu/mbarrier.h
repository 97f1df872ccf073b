// Hopper's barriers in shared memory and its copy engine (TMA), in the emulator.
//
// A copy destroys the old bytes at once. The new ones come when no warp can go on, or at a random time before,
// never in the order of the requests; a tensor's border is exact, and each byte goes where the swizzle wants it.
#pragma once
#include "emu.h"

namespace emu {

// What lies in the 8 bytes of a barrier; on a card they are opaque, too.
struct Barrier {
  uint64_t magic : 8, is_shown : 1, phase : 1, count : 11, left : 11;  // is_shown: to the copy engine
  int64_t bytes : 32;                                                  // still to come; less than 0: came early
};
static_assert(sizeof(Barrier) == 8);
constexpr unsigned kMagic = 0x5a, kBarriers = 64, kBoxes = 64;

// A tensor (B, heads, T, width) of 16-bit numbers, as tests/cuda/emulator.py fills it in: sizes and strides from
// the width on, strides in bytes.
struct Map {
  const char* data;
  uint64_t sizes[4], strides[3];
  uint32_t box_rows;
};

struct Box {
  char* to;
  Map map;
  long long at[4];  // column, token, head, batch
  Barrier* barrier;
};

struct Engine {
  Box boxes[kBoxes];
  Barrier* barriers[kBarriers];
  int owner[kBarriers], n_boxes, n_barriers;
};
static Engine engine;

// The addresses of shared memory as instructions see them; a card's begin at 1024, too.
inline unsigned window_address(const void* p) { return static_cast<const char*>(p) - m.shared + 1024; }
// Where the byte of an unswizzled address lies.
inline char* swizzled(unsigned address) {
  const unsigned at = (address ^ (address >> 7 & 7) << 4) - 1024;
  if (at >= m.shared_bytes) fail("a tile reaches byte %d of %u of shared memory", static_cast<int>(at), m.shared_bytes);
  return m.shared + at;
}

static Barrier* barrier_at(const void* p, const char* what) {
  check_shared(p, 8, what);
  auto* b = static_cast<Barrier*>(const_cast<void*>(p));
  if (b->magic != kMagic) fail("%s: there is no barrier at byte %td", what, static_cast<const char*>(p) - m.shared);
  return b;
}

static void turn(Barrier* b) {  // to the next phase, if this one is over
  if (b->left == 0 && b->bytes == 0) b->phase ^= 1, b->left = b->count;
}

static void arrive(Barrier* b, const char* what, int n_bytes = 0) {
  if (b->left == 0) fail("%s: more than %d arrivals in a phase", what, static_cast<int>(b->count));
  b->left -= 1, b->bytes += n_bytes;
  turn(b);
}

// Copies one box that was asked for.
static bool land() {
  if (engine.n_boxes == 0) return false;
  const int i = draw(engine.n_boxes);
  const Box box = engine.boxes[i];
  engine.boxes[i] = engine.boxes[--engine.n_boxes];
  const Map& map = box.map;
  for (unsigned r = 0; r < map.box_rows; r++)
    for (unsigned c = 0; c < 64; c++) {
      const uint64_t at[4] = {static_cast<uint64_t>(box.at[0]) + c, static_cast<uint64_t>(box.at[1]) + r,
                              static_cast<uint64_t>(box.at[2]), static_cast<uint64_t>(box.at[3])};
      bool is_inside = true;
      for (int d = 0; d < 4; d++) is_inside &= at[d] < map.sizes[d];
      unsigned short number = 0;
      if (is_inside)
        memcpy(&number,
               map.data + 2 * at[0] + at[1] * map.strides[0] + at[2] * map.strides[1] + at[3] * map.strides[2], 2);
      memcpy(swizzled(window_address(box.to) + 128 * r + 2 * c), &number, 2);
    }
  box.barrier->bytes -= 128 * map.box_rows;
  turn(box.barrier);
  return true;
}

static void ask(void* to, const void* map, const long long (&at)[4], Barrier* barrier) {
  if (!barrier->is_shown) fail("copy_box: no fence_proxy_async has shown the barrier to the copy engine");
  if (engine.n_boxes == kBoxes) fail("more than %u boxes in flight", kBoxes);
  Box& box = engine.boxes[engine.n_boxes++];
  box.to = static_cast<char*>(to), box.barrier = barrier;
  memcpy(&box.map, map, sizeof box.map), memcpy(box.at, at, sizeof box.at);
  if (window_address(to) % 1024) fail("copy_box: byte %td is no place for a swizzled tile", box.to - m.shared);
  if (box.to < m.shared || box.to + 128 * box.map.box_rows > m.shared + m.shared_bytes)
    fail("copy_box: byte %td of %u of shared memory", box.to - m.shared, m.shared_bytes);
  memset(to, 0xff, 128 * box.map.box_rows);
}

}  // namespace emu

namespace tinyllm {

struct TensorMap {
  unsigned long long opaque[16];
};
static_assert(sizeof(emu::Map) <= sizeof(TensorMap));

inline unsigned shared_address(const void* p) { return emu::window_address(p); }

inline void mbarrier_init(unsigned long long* barrier, int count) {
  emu::check_shared(barrier, 8, "mbarrier_init");
  auto* b = reinterpret_cast<emu::Barrier*>(barrier);
  *b = {};
  b->magic = emu::kMagic, b->count = b->left = count;
  if (emu::engine.n_barriers == emu::kBarriers) emu::fail("more than %u barriers", emu::kBarriers);
  emu::engine.owner[emu::engine.n_barriers] = emu::m.current;
  emu::engine.barriers[emu::engine.n_barriers++] = b;
}
inline void fence_proxy_async() {
  for (int i = 0; i < emu::engine.n_barriers; i++)
    if (emu::engine.owner[i] == emu::m.current) emu::engine.barriers[i]->is_shown = 1;
}
inline void mbarrier_arrive(unsigned long long* barrier, EMU_CALLER) {
  emu::arrive(emu::barrier_at(barrier, "mbarrier_arrive"), "mbarrier_arrive");
  emu::self().is_over = [](const emu::Thread&) { return true; };  // whoever waited for this may run first
  emu::wait(emu::State::kUntil, {"mbarrier_arrive", file, line});
}
inline void mbarrier_expect(unsigned long long* barrier, int n_bytes) {
  emu::arrive(emu::barrier_at(barrier, "mbarrier_expect"), "mbarrier_expect", n_bytes);
}
inline void mbarrier_wait(unsigned long long* barrier, int parity, EMU_CALLER) {
  emu::Thread& me = emu::self();
  me.subject = emu::barrier_at(barrier, "mbarrier_wait"), me.parity = parity;
  me.is_over = [](const emu::Thread& t) {
    return static_cast<int>(static_cast<const emu::Barrier*>(t.subject)->phase) != t.parity;
  };
  emu::wait(emu::State::kUntil, {"mbarrier_wait", file, line});
}
inline void copy_box(void* shared, const TensorMap* map, int column, int token, int head, int batch,
                     unsigned long long* barrier) {
  emu::ask(shared, map, {column, token, head, batch}, emu::barrier_at(barrier, "copy_box"));
}

}  // namespace tinyllm
