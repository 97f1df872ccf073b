// AVX-512 with VNNI: one 64-byte load is one step of two packed blocks, 32 outputs times 4 inputs.
//
// Weights are vpdpbusd's unsigned factor: a byte's low half is 0 to 15, its high half stays where it is,
// 16 times as large, which saves the shift: the scales of those outputs are divided by 16, exactly.
// Activations are the signed factor, so they lose the 128 that they come with on this instruction set.
#include "tile.h"
#include "w4a8.h"

namespace tinyllm {
namespace {

// Rows by groups of 32 inputs: signed bytes, and where the sum of a low half starts, -8 * (their sum).
// A group's rows lie together; rows apart could share one set of the cache.
template <int ROWS>
struct Rows {
  alignas(64) int8_t q[kMaxScales][ROWS][kScaled];
  int32_t starts[kMaxScales][ROWS];

  Rows(const int8_t* from, int64_t stride, int64_t steps) {
    for (int64_t g = 0; g * kSteps < steps; ++g)
      for (int r = 0; r < ROWS; ++r) {
        const int64_t n = (steps - g * kSteps < kSteps ? steps - g * kSteps : kSteps) * kGroup;
        const auto present = static_cast<__mmask32>((1ull << n) - 1);
        const __m256i plus128 = _mm256_maskz_loadu_epi8(present, from + r * stride + g * kScaled);
        const __m256i flips = _mm256_set1_epi8(static_cast<char>(0x80));
        _mm256_store_si256(reinterpret_cast<__m256i*>(q[g][r]), _mm256_xor_si256(plus128, flips));
        starts[g][r] = static_cast<int32_t>(kZero * (128 * n - sum_bytes(plus128)));
      }
  }
};

// `n` steps of ROWS rows times PAIRS pairs of blocks.
template <int ROWS, int PAIRS>
inline __attribute__((always_inline)) void add_steps(const int8_t (&q)[ROWS][kScaled], const uint8_t* from,
                                                     int64_t n, __m512i (&sums)[ROWS][2 * PAIRS]) {
  const __m512i low = _mm512_set1_epi8(0x0f), high = _mm512_set1_epi8(static_cast<char>(0xf0));
  for (int64_t step = 0; step < n; ++step) {
    __m512i weights[2 * PAIRS];
#pragma GCC unroll 2
    for (int p = 0; p < PAIRS; ++p) {
      const __m512i both = _mm512_load_si512(from + (step * PAIRS + p) * kBlockBytes);
      weights[2 * p] = _mm512_and_si512(both, low);
      weights[2 * p + 1] = _mm512_and_si512(both, high);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      int32_t four;
      __builtin_memcpy(&four, q[r] + step * kGroup, sizeof four);
      const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int b = 0; b < 2 * PAIRS; ++b) multiply_add(sums[r][b], weights[b], x);
    }
  }
}

// ROWS rows times PAIRS pairs of blocks. The sums of a group live in registers; of four rows' totals over
// groups some do not and are touched once in 8 steps (with six rows all: 9 % slower). A sum of 15 bits
// times bf16's 8 is exact, so a fused multiplication rounds as one that is followed by an addition.
template <int ROWS, int PAIRS>
void micro(const int8_t* q, int64_t q_stride, const float* x_scale, const Weight& w, int64_t j,
           float* y, int64_t y_stride) {
  constexpr int BLOCKS = 2 * PAIRS;
  const int64_t steps = (w.k + kGroup - 1) / kGroup;
  const auto* from = reinterpret_cast<const uint8_t*>(w.packed) + j / kPairLanes * pair_bytes(w.k);
  const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  const Rows<ROWS> rows(q, q_stride, steps);
  __m512 totals[ROWS][BLOCKS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS * BLOCKS; ++i) totals[i / BLOCKS][i % BLOCKS] = _mm512_setzero_ps();
  for (int64_t g = 0; g * kSteps < steps; ++g) {
    const uint8_t* scales = from;
    from += PAIRS * kBlockBytes;
    __m512i sums[ROWS][BLOCKS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS * BLOCKS; ++i) {
      const __m512i start = _mm512_set1_epi32(rows.starts[g][i / BLOCKS]);
      sums[i / BLOCKS][i % BLOCKS] = i % 2 ? _mm512_slli_epi32(start, 4) : start;
    }
    const int64_t n = steps - g * kSteps < kSteps ? steps - g * kSteps : kSteps;
    add_steps<ROWS, PAIRS>(rows.q[g], from, n, sums);
    from += n * PAIRS * kBlockBytes;
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) {
      const __m512i both = _mm512_load_si512(scales + b / 2 * kBlockBytes);
      const __m512 scale =
          b % 2 ? _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(both, upper)), _mm512_set1_ps(0x1p-4f))
                : _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
        totals[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][b]), scale, totals[r][b]);
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < BLOCKS; ++b) {
    const int64_t n = w.n - j - b * kLanes;
    const __mmask16 lanes = first_lanes(n > 0 ? n : 0);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m512 value = _mm512_mul_ps(totals[r][b], _mm512_set1_ps(x_scale[r]));
      store_lanes(y + r * y_stride + b * kLanes, value, lanes);
    }
  }
}

template <int PAIRS>
void strip(const int8_t* q, int64_t q_stride, const float* x_scale, int64_t rows, const Weight& w,
           int64_t j, float* y, int64_t y_stride) {
  for (; rows >= 4; rows -= 4, q += 4 * q_stride, x_scale += 4, y += 4 * y_stride)
    micro<4, PAIRS>(q, q_stride, x_scale, w, j, y, y_stride);
  switch (rows) {
    case 3: return micro<3, PAIRS>(q, q_stride, x_scale, w, j, y, y_stride);
    case 2: return micro<2, PAIRS>(q, q_stride, x_scale, w, j, y, y_stride);
    case 1: return micro<1, PAIRS>(q, q_stride, x_scale, w, j, y, y_stride);
    default: return;
  }
}

}  // namespace

void tile_w4_avx512vnni(const int8_t* q, int64_t q_stride, const float* x_scale, int64_t rows,
                        const Weight& w, int64_t first, float* y, int64_t y_stride) {
  if (panel_pairs(w.n, first) == 2) {
    strip<2>(q, q_stride, x_scale, rows, w, first, y, y_stride);
  } else {
    strip<1>(q, q_stride, x_scale, rows, w, first, y, y_stride);
  }
}

}  // namespace tinyllm
