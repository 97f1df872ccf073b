// Vectors of fp32 numbers with exponentials and reductions, and bf16 numbers one at a time.
//
// For kernels that are compared within a tolerance, so the compiler may contract products and sums;
// lanes.h has what must give equal bits everywhere. Everything is static: see w8a8.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace tinyllm {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// fp32 in vectors of kLanes; what the compiler makes of them depends on the unit's flags.
template <int64_t n_lanes, int64_t n_vectors>
struct Fp32 {
  static constexpr int64_t kLanes = n_lanes, kGroup = 1, kVectors = n_vectors;
  typedef float Vec __attribute__((vector_size(n_lanes * 4)));
  typedef int32_t Ints __attribute__((vector_size(n_lanes * 4)));
  using Operand = Vec;

  static Operand operand(const uint32_t* words) {
    Operand x;
    __builtin_memcpy(&x, words, sizeof x);
    return x;
  }
  static Operand splat(const uint32_t* word) {
    float x;
    __builtin_memcpy(&x, word, sizeof x);
    return Vec{} + x;
  }
  static Vec dot(Vec sum, Operand a, Operand b) { return sum + a * b; }
  static void store_row(uint32_t* words, Vec x) { __builtin_memcpy(words, &x, sizeof x); }
};

template <class S>
[[gnu::always_inline]] inline typename S::Vec load(const float* x) {
  typename S::Vec y;
  __builtin_memcpy(&y, x, sizeof y);
  return y;
}

template <class S>
[[gnu::always_inline]] inline void store(float* y, typename S::Vec x) {
  __builtin_memcpy(y, &x, sizeof x);
}

template <class S>
[[gnu::always_inline]] inline typename S::Vec larger(typename S::Vec a, typename S::Vec b) {
#ifdef __AVX512F__  // a NaN in b stays
  return (typename S::Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return (typename S::Vec)_mm256_max_ps((__m256)a, (__m256)b);
#endif
}

// The sum of all lanes, and the largest one, by halves.
template <class S>
[[gnu::always_inline]] inline float sum_lanes(typename S::Vec x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#else
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#endif
}

template <class S>
[[gnu::always_inline]] inline float largest_lane(typename S::Vec x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)x);
#else
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
#endif
}

// 2^x for x up to 127, exactly 0 below -126.5: 2^round(x) times a polynomial of the rest, |rest| <=
// 1/2, with the least largest relative error (7.5e-8, about fp32's rounding).
template <class S>
[[gnu::always_inline]] inline typename S::Vec exp2_lanes(typename S::Vec x) {
  using Vec = typename S::Vec;
  using Ints = typename S::Ints;
  x = larger<S>(Vec{} - 127.0f, x);
  const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to a whole number
  const Vec rest = x - (shifted - 12582912.0f);
  Vec series = Vec{} + 1.32764713e-3f;
  series = series * rest + 9.67554096e-3f;
  series = series * rest + 5.55071309e-2f;
  series = series * rest + 2.40221202e-1f;
  series = series * rest + 6.93146944e-1f;
  series = series * rest + 1.00000012f;
  Ints bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);  // the whole number, biased, as an exponent
  Vec power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return series * power;
}

[[gnu::always_inline]] inline float widen(float x) { return x; }
[[gnu::always_inline]] inline float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}

[[gnu::always_inline]] inline void narrow(float x, float* y) { *y = x; }
[[gnu::always_inline]] inline void narrow(float x, uint16_t* y) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // halves to even
  *y = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

}  // namespace
}  // namespace tinyllm
