// AVX2: 8 outputs per register, two registers per packed block.
//
// AVX2 multiplies unsigned by signed bytes and saturates pairs at 16 bits. |q| as the unsigned side
// and the sign moved to the weight keeps pairs within 2 * 127 * 127 = 32258 < 32767: exact.
#include "attend_rows.h"
#include "quantize.h"
#include "tile.h"
#include "w4a8.h"

namespace tinyllm {
namespace {

uint32_t largest_magnitude(const float* x, int64_t k) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= k; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    most = _mm256_max_epu32(most, _mm256_and_si256(bits, mask));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
  uint32_t largest = 0;
  for (int lane = 0; lane < 8; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
  for (; i < k; ++i) {
    const uint32_t bits = magnitude(x + i);
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// 8 floats to 8 bytes; packing saturates, and |value| <= 127 already.
int64_t to_bytes(__m256 x, __m256 inverse) {
  const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse));  // half to even
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  return _mm_cvtsi128_si64(_mm_packs_epi16(shorts, shorts));
}

float quantize(const float* x, int64_t k, int8_t* q, uint8_t flip) {
  float factor;
  const float scale = row_scale(largest_magnitude(x, k), k, q, flip, &factor);
  if (factor == 0.0f) return scale;
  const __m256 inverse = _mm256_set1_ps(factor);
  const int64_t flips = static_cast<int64_t>(0x0101010101010101ull * flip);
  int64_t i = 0;
  for (; i + 8 <= k; i += 8) {
    const int64_t bytes = to_bytes(_mm256_loadu_ps(x + i), inverse) ^ flips;
    __builtin_memcpy(q + i, &bytes, 8);
  }
  if (i < k) {
    float rest[8] = {0};
    __builtin_memcpy(rest, x + i, static_cast<size_t>(k - i) * sizeof(float));
    const int64_t bytes = to_bytes(_mm256_loadu_ps(rest), inverse) ^ flips;
    __builtin_memcpy(q + i, &bytes, static_cast<size_t>(k - i));
  }
  return scale;
}

// Two packed blocks (32 outputs) times one row: four accumulators hide the latency.
void row_times_blocks(const int8_t* q, const int8_t* packed, int64_t groups, int64_t step_bytes,
                      int64_t n_blocks, __m256i* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  const int8_t* second = packed + (n_blocks > 1 ? kBlockBytes : 0);
  __m256i a0 = _mm256_setzero_si256(), a1 = a0, b0 = a0, b1 = a0;
  for (int64_t group = 0; group < groups; ++group) {
    int32_t four;
    __builtin_memcpy(&four, q + group * kGroup, sizeof four);
    const __m256i x = _mm256_set1_epi32(four), magnitude = _mm256_abs_epi8(x);
    const auto step = [&](__m256i sum, const int8_t* from) {
      const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + group * step_bytes));
      const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(w, x));
      return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    };
    a0 = step(a0, packed);
    a1 = step(a1, packed + 32);
    b0 = step(b0, second);
    b1 = step(b1, second + 32);
  }
  sums[0] = a0, sums[1] = a1, sums[2] = b0, sums[3] = b1;
}

void tile(const int8_t* q, int64_t q_stride, const float* x_scale, int64_t rows, const Weight& w,
          int64_t first, float* y, int64_t y_stride) {
  const int64_t groups = (w.k + kGroup - 1) / kGroup;
  const int64_t end = first + kPanel < w.n ? first + kPanel : w.n;
  const int64_t step_bytes = panel_blocks(w.n, first) * kBlockBytes;
  for (int64_t j = first; j < end; j += 2 * kLanes) {
    const int8_t* packed = w.packed + first * groups * kGroup + (j - first) * kGroup;
    const int64_t n_blocks = end - j > kLanes ? 2 : 1;
    for (int64_t i = 0; i < rows; ++i) {
      __m256i sums[4];
      row_times_blocks(q + i * q_stride, packed, groups, step_bytes, n_blocks, sums);
      const __m256 scale = _mm256_set1_ps(x_scale[i]);
      for (int64_t part = 0; part < 2 * n_blocks; ++part) {
        const int64_t at = j + 8 * part;
        const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[part]), scale);
        store_first(y + i * y_stride + at - first, _mm256_mul_ps(scaled, _mm256_loadu_ps(w.scale + at)), end - at);
      }
    }
  }
}

}  // namespace

const Isa kAvx2 = {quantize, tile, tile_w4_avx2, 0, rms_norm, add,
                   rotate, attend, open_head, attend_rows, narrow, gate};

}  // namespace tinyllm
