// 4-bit weights on the CPU: y = dequantise(quantise(x)) W^T with one scale per output and 32 inputs.
//
// Dimensions as in w8a8.h. The layout is drawn in kernels/LAYOUT.md; a weight has `bits` 4 and holds
// its scales among its numbers. Every function gives the same bits as tinyllm/ops/reference.py.
#pragma once
#include "w8a8.h"

namespace tinyllm {

constexpr int64_t kScaled = 32;                     // neighbouring inputs that share a scale
constexpr int64_t kSteps = kScaled / kGroup;        // steps of a packed block that they take
constexpr int64_t kPairLanes = 2 * kLanes;          // outputs of two blocks whose numbers share bytes
constexpr int64_t kPairsPerPanel = kPanel / kPairLanes;
constexpr int64_t kMaxScales = kMaxK / kScaled;
constexpr int64_t kZero = 8;                        // numbers are stored with 8 added

// The pairs of blocks of the panel that begins at output `first`: 2, or 1 in the last one.
static inline int64_t panel_pairs(int64_t n, int64_t first) { return n - first > kPairLanes ? 2 : 1; }

// Bytes of one pair: a line of scales for every 32 inputs, a line of numbers for every 4.
static inline int64_t pair_bytes(int64_t k) {
  const int64_t steps = (k + kGroup - 1) / kGroup;
  return (steps + (steps + kSteps - 1) / kSteps) * kBlockBytes;
}

// Isa::tile for such a weight, summed over the groups g of 32 inputs in rising order, in fp32:
// y[i][j] = (sum_g float(sum_{k in g} q[i][k] W[j][k]) * scale[j][g]) * x_scale[i].
// |int32 sum| <= 32 * 128 * 15, no overflow.
void tile_w4_scalar(const int8_t* q, int64_t q_stride, const float* x_scale, int64_t rows,
                    const Weight& weight, int64_t first, float* y, int64_t y_stride);
void tile_w4_avx2(const int8_t* q, int64_t q_stride, const float* x_scale, int64_t rows,
                  const Weight& weight, int64_t first, float* y, int64_t y_stride);
void tile_w4_avx512vnni(const int8_t* q, int64_t q_stride, const float* x_scale, int64_t rows,
                        const Weight& weight, int64_t first, float* y, int64_t y_stride);

}  // namespace tinyllm

extern "C" {
// Pack rows of 4-bit numbers [N][K/2] (the first of two inputs in the low half of a byte, 8 added) and
// bf16 scales [N][ceil(K/32)]. `packed` has ceil(N/32) times `pair_bytes` bytes. K is even.
int tinyllm_pack_w4(const uint8_t* w, const uint16_t* scale, int64_t n, int64_t k, int8_t* packed);
}
