// AVX2: a register has the numbers of 8 outputs of one block in its low halves, of the next in its high.
//
// Weights are the unsigned factor, 0 to 15, activations the signed one. Pairs of products stay within
// 2 * 15 * 127 and the 8 steps of a group within 30480 < 32767: 16-bit sums need no widening until then.
#include "tile.h"
#include "w4a8.h"

namespace tinyllm {
namespace {

// -8 * (the sum of the 4 * `steps` bytes from q): what undoes the 8 that every weight has too much.
int32_t undo_zero(const int8_t* q, int64_t steps) {
  int64_t sum = 0;
  if (steps == kSteps) {  // unsigned bytes, 128 added, can be summed eight at a time
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    const __m256i plus128 = _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(0x80)));
    sum = sum_bytes(plus128) - 128 * kScaled;
  } else {
    for (int64_t i = 0; i < steps * kGroup; ++i) sum += q[i];
  }
  return static_cast<int32_t>(-kZero * sum);
}

__m256 group_total(__m256 total, __m256i pairs, __m256i start, __m256 scale) {
  const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), start);
  return _mm256_add_ps(total, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale));
}

__m256i load(const uint8_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }

// One row times a pair of blocks: totals of outputs 0-7, 8-15, 16-23, 24-31.
void row_times_pair(const int8_t* q, const uint8_t* at, int64_t line, int64_t steps, __m256* totals) {
  const __m256i low = _mm256_set1_epi8(0x0f);
  const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  for (int part = 0; part < 4; ++part) totals[part] = _mm256_setzero_ps();
  for (int64_t step = 0; step < steps;) {
    const int64_t n = steps - step < kSteps ? steps - step : kSteps;
    const __m256i start = _mm256_set1_epi32(undo_zero(q, n));
    const __m256i scales0 = load(at), scales1 = load(at + 32);
    at += line;
    __m256i a0 = _mm256_setzero_si256(), a1 = a0, b0 = a0, b1 = a0;
    for (int64_t end = step + n; step < end; ++step, q += kGroup, at += line) {
      int32_t four;
      __builtin_memcpy(&four, q, sizeof four);
      const __m256i x = _mm256_set1_epi32(four), w0 = load(at), w1 = load(at + 32);
      a0 = _mm256_add_epi16(a0, _mm256_maddubs_epi16(_mm256_and_si256(w0, low), x));
      a1 = _mm256_add_epi16(a1, _mm256_maddubs_epi16(_mm256_and_si256(w1, low), x));
      b0 = _mm256_add_epi16(b0, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w0, 4), low), x));
      b1 = _mm256_add_epi16(b1, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w1, 4), low), x));
    }
    totals[0] = group_total(totals[0], a0, start, _mm256_castsi256_ps(_mm256_slli_epi32(scales0, 16)));
    totals[1] = group_total(totals[1], a1, start, _mm256_castsi256_ps(_mm256_slli_epi32(scales1, 16)));
    totals[2] = group_total(totals[2], b0, start, _mm256_castsi256_ps(_mm256_and_si256(scales0, upper)));
    totals[3] = group_total(totals[3], b1, start, _mm256_castsi256_ps(_mm256_and_si256(scales1, upper)));
  }
}

}  // namespace

void tile_w4_avx2(const int8_t* q, int64_t q_stride, const float* x_scale, int64_t rows,
                  const Weight& w, int64_t first, float* y, int64_t y_stride) {
  const int64_t steps = (w.k + kGroup - 1) / kGroup, pairs = panel_pairs(w.n, first);
  const auto* panel = reinterpret_cast<const uint8_t*>(w.packed) + first / kPairLanes * pair_bytes(w.k);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t at = pair * kPairLanes, n = w.n - first - at;
    for (int64_t i = 0; i < rows; ++i) {
      __m256 totals[4];
      row_times_pair(q + i * q_stride, panel + pair * kBlockBytes, pairs * kBlockBytes, steps, totals);
      const __m256 scale = _mm256_set1_ps(x_scale[i]);
      for (int64_t part = 0; part < 4; ++part)
        store_first(y + i * y_stride + at + 8 * part, _mm256_mul_ps(totals[part], scale), n - 8 * part);
    }
  }
}

}  // namespace tinyllm
