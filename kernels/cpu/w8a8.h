// INT8 linear layers on the CPU: y = dequantise(quantise(x) W^T), called from tinyllm/ops/cpu.py.
//
// One scale per row of x and one per output: Dettmers et al. 2022, arXiv:2208.07339, vector-wise quantisation.
// Dimensions: M rows of x, N outputs, K inputs. Layouts are drawn in kernels/LAYOUT.md.
// Every function gives the same bits as tinyllm/ops/reference.py, on every instruction set.
#pragma once
#include <cstdint>

namespace tinyllm {

constexpr int64_t kLanes = 16;         // outputs side by side in a packed block
constexpr int64_t kGroup = 4;          // inputs of one output that lie together
constexpr int64_t kBlockBytes = kLanes * kGroup;      // one block: one AVX-512 register
constexpr int64_t kBlocksPerPanel = 4;                // blocks that are read as one stream
constexpr int64_t kPanel = kLanes * kBlocksPerPanel;  // outputs that one tile computes
constexpr int64_t kTogether = 4;     // rows that attention takes through the keys together
constexpr int64_t kHadamard = 32;    // inputs of down_proj that are rotated together
constexpr int64_t kMaxK = 65536;     // K * 255 * 127 < 2^31, so no int32 sum overflows

// Rows with a smaller largest magnitude count as zero: 127 / absmax would leave the range of float.
constexpr float kTinyAbsmax = 0x1p-100f;

// A packed weight matrix; owned by the caller, who keeps all memory alive.
struct Weight {
  const int8_t* packed;     // panels [ceil(K/4)][blocks][16][4], zeros where padded, 64-byte aligned
  const int32_t* offset;    // [ceil(N/16)*16]: -128 * sum of the row, which undoes unsigned inputs
  const float* scale;       // [ceil(N/16)*16]
  int64_t n, k;
  int64_t isa;              // index in the table of instruction sets
  int64_t bits;             // 8: as above; 4: `packed` as in w4a8.h, no `offset` and `scale`
};

// The blocks of the panel that begins at output `first`: 4, fewer in the last one.
static inline int64_t panel_blocks(int64_t n, int64_t first) {
  const int64_t blocks = (n - first + kLanes - 1) / kLanes;
  return blocks < kBlocksPerPanel ? blocks : kBlocksPerPanel;
}

// What keys and values are stored as; in INT8 by `Isa::quantize`, the row is a head's K numbers.
enum class Stored : int64_t { kFloat, kBf16, kInt8 };

// The keys and values that one head of one query sees.
struct CachedHead {
  const void *keys, *values;  // the numbers of a position lie together
  const float *key_scale, *value_scale;  // [n_keys], with INT8; else not read
  const void* next_keys;      // what the thread most likely reads next: fetched meanwhile; or null
  int64_t stride;             // numbers from one position to the next
  int64_t n_keys;
  Stored stored;
};

// A head's keys and values in fp32, INT8 still without its scales.
struct OpenHead {
  const float* keys;          // [ceil(n_keys / 16)][d_head][16]
  const float* values;        // [n_keys][d_head]
  const float *key_scale, *value_scale;  // [n_keys], or null
};

// Quantised rows times 64 outputs of a weight.
using Tile = void (*)(const int8_t* q, int64_t q_stride, const float* x_scale, int64_t rows,
                      const Weight& weight, int64_t first, float* y, int64_t y_stride);

// One instruction set.
struct Isa {
  // Quantise one row: scale = absmax / 127, q[i] = round_half_even(x[i] * (127 / absmax)), both in
  // fp32; returns the scale. Bytes are flipped by `flip` (0x80 makes them unsigned with offset 128).
  // A row of zeros gives scale 0; a row with NaN or infinity gives scale NaN; q = 0 in both.
  float (*quantize)(const float* x, int64_t k, int8_t* q, uint8_t flip);

  // y[i][j] = (float(sum_k q[i][k] W[j][k]) * x_scale[i]) * W.scale[j] for `rows` rows and the
  // outputs [first, min(first + kPanel, N)); int32 sums, the products in this order.
  Tile tile_w8;
  Tile tile_w4;             // the same for weights of 4 bits: w4a8.h

  uint8_t flip;             // how both want the bytes of q

  // Float steps of decoding, see lanes.h. y = weight * x / sqrt(mean(x^2) + eps), in place if y is x.
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* y);

  // y += x.
  void (*add)(const float* x, int64_t n, float* y);

  // Turns the pairs (x[i], x[half + i]) by the angles with these cosines and sines, in place.
  void (*rotate)(float* x, const float* cosines, const float* sines, int64_t half);

  // y = softmax(q K^T / sqrt(d_head)) V for one query; `scores` has room for n_keys numbers. A scale
  // of INT8 multiplies its key's score and its value's weight: once a position, not once a number.
  void (*attend)(const float* q, const CachedHead& cached, int64_t d_head, float* scores, float* y);

  // A head's keys and values made ready for many queries.
  void (*open_head)(const CachedHead& cached, int64_t d_head, float* keys, float* values);

  // `attend` for rows that follow each other, of which the first sees n_keys keys, the next one more; `scores` has
  // room for kTogether rows of them, rounded up to whole blocks.
  void (*attend_rows)(const float* q, int64_t q_stride, int64_t rows, const OpenHead& head, int64_t n_keys,
                      int64_t d_head, float* scores, float* y, int64_t y_stride);

  // y = x rounded to bf16, halves to even.
  void (*narrow)(const float* x, int64_t n, uint16_t* y);

  // y = gate / (1 + exp(-gate)) * up for kHadamard numbers; if `rotated` H y / sqrt(32), H their Walsh-Hadamard matrix.
  void (*gate)(const float* gates, const float* ups, bool rotated, float* y);

  // What multiplies by this weight; looked up once per panel, outside all loops over inputs.
  Tile tile(const Weight& weight) const { return weight.bits == 4 ? tile_w4 : tile_w8; }
};

// Defined in one translation unit each, because each has its own compiler flags. Those units use
// intrinsics and static functions only: an inline function of the standard library compiled there
// could replace the portable copy at link time and crash an older processor.
extern const Isa kScalar;
extern const Isa kAvx2;
extern const Isa kAvx512Vnni;

// The instruction set with a known number.
const Isa& isa_of(int64_t number);

}  // namespace tinyllm

// The C interface. Return 0, or a negative number where an argument is impossible.
extern "C" {
// 1 if the processor and the operating system can run instruction set `isa` (0 scalar, 1 AVX2 with
// FMA, 2 AVX-512 with VNNI, 3 that with BF16), else 0.
int tinyllm_isa_supported(int64_t isa);

// Pack row-major weights [N][K] and compute the offsets. `packed` and `offset` have the padded sizes.
int tinyllm_pack_w8(const int8_t* w, int64_t n, int64_t k, int8_t* packed, int32_t* offset);

// Quantise M rows of x [M][K] into q [M][K] and scale [M].
int tinyllm_quantize_rows(const float* x, int64_t m, int64_t k, int8_t* q, float* scale,
                          int64_t isa, int64_t threads);

// y [M][N] = dequantise(quantise(x [M][K]) W^T). Uses at most `threads` threads, one for small work.
int tinyllm_linear(const tinyllm::Weight* weight, const float* x, int64_t m, float* y, int64_t threads);
}
