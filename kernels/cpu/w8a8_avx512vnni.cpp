// AVX-512 with VNNI: one register is one step of a packed block, 16 outputs times 4 inputs.
//
// vpdpbusd multiplies unsigned by signed bytes and adds four products to an int32 without
// saturation. The inputs are stored with 128 added; an output's offset, -128 * (sum of its weights), undoes that.
#include "attend_rows.h"
#include "quantize.h"
#include "tile.h"
#include "w4a8.h"

namespace tinyllm {
namespace {

float quantize(const float* x, int64_t k, int8_t* q, uint8_t flip) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 16) {
    const __m512i bits = _mm512_maskz_loadu_epi32(first_lanes(k - i), x + i);
    most = _mm512_max_epu32(most, _mm512_and_si512(bits, mask));
  }
  float factor;
  const float scale = row_scale(_mm512_reduce_max_epu32(most), k, q, flip, &factor);
  if (factor == 0.0f) return scale;
  const __m512 inverse = _mm512_set1_ps(factor);
  const __m128i flips = _mm_set1_epi8(static_cast<char>(flip));
  for (int64_t i = 0; i < k; i += 16) {
    const __mmask16 lanes = first_lanes(k - i);
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), inverse));
    const __m128i bytes = _mm_xor_si128(_mm512_cvtsepi32_epi8(rounded), flips);
    _mm_mask_storeu_epi8(q + i, lanes, bytes);
  }
  return scale;
}

__m512i four_inputs(const int8_t* q) {
  int32_t four;
  __builtin_memcpy(&four, q, sizeof four);
  return _mm512_set1_epi32(four);
}

// ROWS rows times BLOCKS blocks; all sums live in registers (6 * 4 + 4 + 1 of 32).
template <int ROWS, int BLOCKS>
void micro(const int8_t* q, int64_t q_stride, const float* x_scale, const Weight& w, int64_t j,
           int64_t groups, float* y, int64_t y_stride) {
  const int8_t* packed = w.packed + j * groups * kGroup;
  __m512i sums[ROWS][BLOCKS];
#pragma GCC unroll 4
  for (int b = 0; b < BLOCKS; ++b) {
    __builtin_prefetch(w.offset + j + b * kLanes);  // wanted at the end: 1.02 to 1.05 times the tokens on one thread
    __builtin_prefetch(w.scale + j + b * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) sums[r][b] = _mm512_setzero_si512();
  }
  int64_t group = 0;
  // One row is multiplied faster than memory brings the weights: the 320 instructions that Zen 4 has under way would
  // hold over 100 loads, more than wait for memory at once, and those that fetch ahead find no place. Eight empty ones
  // a line leave about 30. On 2 threads 1.10 (d 768) and 1.09 to 1.29 (d 1024) times the tokens, 0.98 to 0.99 from the
  // caches (d 256). Hints what to fetch cost 3 to 20 % instead.
  if constexpr (ROWS == 1) {
    for (; group < groups; ++group) {
      const __m512i x = four_inputs(q + group * kGroup);
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; ++b) {
        multiply_add(sums[0][b], x, _mm512_load_si512(packed + (group * BLOCKS + b) * kBlockBytes));
        asm volatile("nop; nop; nop; nop; nop; nop; nop; nop");
      }
    }
  }
  for (; group < groups; ++group) {
    __m512i weights[BLOCKS];
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b)
      weights[b] = _mm512_load_si512(packed + (group * BLOCKS + b) * kBlockBytes);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const __m512i x = four_inputs(q + r * q_stride + group * kGroup);
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; ++b) multiply_add(sums[r][b], x, weights[b]);
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < BLOCKS; ++b) {
    const __mmask16 lanes = first_lanes(w.n - j - b * kLanes);
    const __m512 scale = _mm512_loadu_ps(w.scale + j + b * kLanes);
    const __m512i offset = _mm512_loadu_si512(w.offset + j + b * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(sums[r][b], offset));
      const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(x_scale[r])), scale);
      store_lanes(y + r * y_stride + b * kLanes, scaled, lanes);
    }
  }
}

template <int BLOCKS>
void strip(const int8_t* q, int64_t q_stride, const float* x_scale, int64_t rows, const Weight& w,
           int64_t j, int64_t groups, float* y, int64_t y_stride) {
  for (; rows >= 6; rows -= 6, q += 6 * q_stride, x_scale += 6, y += 6 * y_stride)
    micro<6, BLOCKS>(q, q_stride, x_scale, w, j, groups, y, y_stride);
  switch (rows) {
    case 5: return micro<5, BLOCKS>(q, q_stride, x_scale, w, j, groups, y, y_stride);
    case 4: return micro<4, BLOCKS>(q, q_stride, x_scale, w, j, groups, y, y_stride);
    case 3: return micro<3, BLOCKS>(q, q_stride, x_scale, w, j, groups, y, y_stride);
    case 2: return micro<2, BLOCKS>(q, q_stride, x_scale, w, j, groups, y, y_stride);
    case 1: return micro<1, BLOCKS>(q, q_stride, x_scale, w, j, groups, y, y_stride);
    default: return;
  }
}

void tile(const int8_t* q, int64_t q_stride, const float* x_scale, int64_t rows, const Weight& w,
          int64_t first, float* y, int64_t y_stride) {
  const int64_t groups = (w.k + kGroup - 1) / kGroup;
  switch (panel_blocks(w.n, first)) {
    case 4: return strip<4>(q, q_stride, x_scale, rows, w, first, groups, y, y_stride);
    case 3: return strip<3>(q, q_stride, x_scale, rows, w, first, groups, y, y_stride);
    case 2: return strip<2>(q, q_stride, x_scale, rows, w, first, groups, y, y_stride);
    default: return strip<1>(q, q_stride, x_scale, rows, w, first, groups, y, y_stride);
  }
}

}  // namespace

const Isa kAvx512Vnni = {quantize, tile, tile_w4_avx512vnni, 0x80, rms_norm, add,
                         rotate, attend, open_head, attend_rows, narrow, gate};

}  // namespace tinyllm
