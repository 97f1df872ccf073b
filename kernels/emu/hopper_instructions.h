// What hopper_instructions.h of kernels/cuda does in PTX, done by the emulator; see there for the meaning.
//
// A product reads its tiles at the start or only at the wait, by chance: a tile that comes too late or is
// overwritten too early shows. Its sums are NaN until the wait. Each warp computes its 16 rows; that the four
// warps of a group multiply the same is checked at the block's end. Matrices in shared memory are found by the
// descriptor's bits alone, as the PTX ISA draws the layouts of 128-byte swizzling ("Strides", "Matrix descriptor").
#pragma once
#include "device.h"

#include "mbarrier.h"

namespace emu {

constexpr int kProducts = 64, kMaxColumns = 128;

struct Product {
  Site site;
  float* d[kLanes];                        // [columns / 8][4] of each lane
  float before[kLanes][kMaxColumns / 2];   // what D had been, for the first of a chain
  float a[16][16], b[16][kMaxColumns];     // [row][depth], [depth][column]
  float (*to_float)(unsigned short);
  uint64_t rows, others;                   // descriptors; rows: of A, unless in registers
  int n_columns, group;                    // group: -1 until committed
  bool a_in_registers, is_first, is_read, adds;
};

struct Queue {  // of a warp
  Product products[kProducts];
  int n, n_groups;
  bool is_fenced;
  uint64_t digest;  // of all it multiplied
};
static Queue queues[kMaxWarps];
inline Queue& queue() { return queues[m.current / kLanes]; }

// Byte of element (across, depth) of a matrix; K-major: depth runs along the rows of 128 bytes.
static unsigned element(uint64_t descriptor, bool k_major, int across, int depth) {
  const unsigned first = (descriptor & 0x3fff) << 4;
  const unsigned leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("wgmma: the emulator knows the swizzle of 128 bytes only");
  if (descriptor >> 49 & 7) fail("wgmma: the emulator knows tiles at multiples of 1024 bytes only");
  if (k_major) return first + across / 8 * stride + across % 8 * 128 + 2 * depth;
  return first + across / 64 * leading + across % 64 * 2 + depth / 8 * stride + depth % 8 * 128;
}

static void read_tiles(Product& p, int warp) {
  p.is_read = true;
  const auto number = [&](unsigned address) {
    unsigned short bits;
    memcpy(&bits, swizzled(address), 2);
    return p.to_float(bits);
  };
  for (int k = 0; k < 16; k++) {
    for (int c = 0; c < p.n_columns; c++) p.b[k][c] = number(element(p.others, !p.a_in_registers, c, k));
    if (!p.a_in_registers)
      for (int r = 0; r < 16; r++) p.a[r][k] = number(element(p.rows, true, warp % 4 * 16 + r, k));
  }
}

static void finish(Product& p, int warp) {
  if (!p.is_read) read_tiles(p, warp);
  for (int l = 0; l < kLanes; l++) {
    float* d = p.d[l];
    if (p.is_first) memcpy(d, p.before[l], p.n_columns / 2 * sizeof(float));
    for (int i = 0; i < p.n_columns / 2; i++) {
      const int r = l / 4 + i % 4 / 2 * 8, c = i / 4 * 8 + l % 4 * 2 + i % 2;
      float sum = p.adds ? d[i] : 0;
      for (int k = 0; k < 16; k++) sum += p.a[r][k] * p.b[k][c];
      d[i] = sum;
    }
  }
}

struct ProductOperands {  // of a lane
  float* d;
  const unsigned* a;
  const Product* product;
  int n_left;
};

// The warp's lanes meet; one queues the product for all.
static void multiply(const Product& product, float* d, const unsigned* a) {
  ProductOperands mine{d, a, &product, 0};
  meet(product.site, &mine, [](void* const all[kLanes]) {
    Queue& q = queue();
    const int warp = m.current / kLanes;
    if (q.n == kProducts) fail("more than %d products in flight", kProducts);
    Product& p = q.products[q.n];
    p = *static_cast<ProductOperands*>(all[0])->product;
    p.group = -1, p.is_read = false, p.is_first = true;
    for (int l = 0; l < kLanes; l++) p.d[l] = static_cast<ProductOperands*>(all[l])->d;
    for (int i = 0; i < q.n; i++) p.is_first &= q.products[i].d[0] != p.d[0];
    if (p.is_first && !q.is_fenced) fail("%s: no wgmma_fence since the last wgmma_wait", p.site.name);
    for (int l = 0; l < kLanes; l++) {
      if (p.is_first) memcpy(p.before[l], p.d[l], p.n_columns / 2 * sizeof(float));
      memset(p.d[l], 0xff, p.n_columns / 2 * sizeof(float));
      if (!p.a_in_registers) continue;
      for (int e = 0; e < 8; e++) {
        const unsigned word = static_cast<ProductOperands*>(all[l])->a[e / 2];
        p.a[l / 4 + e / 2 % 2 * 8][l % 4 * 2 + e % 2 + e / 4 * 8] = p.to_float(e % 2 ? word >> 16 : word);
      }
    }
    q.digest = (q.digest ^ p.rows ^ p.others << 1 ^ p.n_columns ^ p.site.line) * 0x9e3779b97f4a7c15ull;
    q.n++;
    if (draw(2)) read_tiles(p, warp);
  });
}

static void wait_for_products(int n_left, const Site& site, float* d) {
  ProductOperands mine{d, nullptr, nullptr, n_left};
  meet(site, &mine, [](void* const all[kLanes]) {
    const auto& first = *static_cast<ProductOperands*>(all[0]);
    Queue& q = queue();
    int kept = 0;
    for (int i = 0; i < q.n; i++) {
      Product& p = q.products[i];
      if (p.group >= 0 && p.group < q.n_groups - first.n_left) {
        finish(p, m.current / kLanes);
      } else {
        if (p.d[0] == first.d) fail("wgmma_wait: the sums may not be there yet");
        if (kept != i) q.products[kept] = p;
        kept++;
      }
    }
    q.n = kept, q.is_fenced = false;
  });
}

static void begin_of_block() {
  engine.n_boxes = engine.n_barriers = 0;
  for (Queue& q : queues) q.n = q.n_groups = q.is_fenced = q.digest = 0;
}

static void end_of_block() {
  if (engine.n_boxes) fail("%d copies that no one waits for", engine.n_boxes);
  for (int w = 0; w < m.n_threads / kLanes; w++) {
    if (queues[w].n) fail("warp %d returns with %d products in flight", w, queues[w].n);
    const int first = w / 4 * 4;
    if (queues[w].digest != queues[first].digest) fail("warps %d and %d of a group multiply different tiles", first, w);
  }
}

static const bool is_hopper = [] {
  card = {227 * 1024, 1024, begin_of_block, land, end_of_block};
  return true;
}();

}  // namespace emu

namespace tinyllm {

template <int kCount>
void give_registers() {}
template <int kCount>
void take_registers() {}

inline void wgmma_fence(EMU_CALLER) {
  emu::meet({"wgmma_fence", file, line}, nullptr, [](void* const*) { emu::queue().is_fenced = true; });
}
inline void wgmma_commit(EMU_CALLER) {
  emu::meet({"wgmma_commit", file, line}, nullptr, [](void* const*) {
    emu::Queue& q = emu::queue();
    for (int i = 0; i < q.n; i++)
      if (q.products[i].group < 0) q.products[i].group = q.n_groups;
    q.n_groups++;
  });
}
template <int kLeft, int kTiles>
void wgmma_wait(float (&d)[kTiles][4], EMU_CALLER) {
  emu::wait_for_products(kLeft, {"wgmma_wait", file, line}, d[0]);
}

template <class T>
float number_of(unsigned short bits) { return to_float(T{bits}); }

template <class T, int kTiles>
void wgmma_rows(float (&d)[kTiles][4], u64 rows, u64 others, bool more, EMU_CALLER) {
  static_assert(kTiles == 8 || kTiles == 16);
  emu::Product p{};
  p.site = {"wgmma_rows", file, line}, p.to_float = number_of<T>, p.n_columns = 8 * kTiles;
  p.rows = rows, p.others = others, p.adds = more;
  emu::multiply(p, d[0], nullptr);
}
template <class T, int kTiles>
void wgmma_columns(float (&d)[kTiles][4], const unsigned (&a)[4], u64 columns, EMU_CALLER) {
  static_assert(kTiles == 8 || kTiles == 16);
  emu::Product p{};
  p.site = {"wgmma_columns", file, line}, p.to_float = number_of<T>, p.n_columns = 8 * kTiles;
  p.others = columns, p.a_in_registers = p.adds = true;
  emu::multiply(p, d[0], a);
}

}  // namespace tinyllm

#define SHARED_TILES(type, name) type& name = *reinterpret_cast<type*>(emu::m.shared)
