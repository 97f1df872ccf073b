// Sixteen numbers as one vector, with what lanes.h does to them: a register of AVX-512, or what the
// compiler makes of it.
#pragma once
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "shuffle.h"
#include "w8a8.h"

namespace tinyllm {
namespace {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t WordLanes __attribute__((vector_size(64)));
typedef uint16_t ShortLanes __attribute__((vector_size(32)));
typedef int8_t ByteLanes __attribute__((vector_size(16)));
typedef float Eight __attribute__((vector_size(32)));

// Slices of 16 outputs that attention sums at a time, even and odd keys apart: 8 of 32 registers.
constexpr int kSlices = 4;

[[gnu::always_inline]] inline Lanes load_all(const float* x) {
  Lanes lanes;
  __builtin_memcpy(&lanes, x, sizeof lanes);
  return lanes;
}

#ifdef __AVX512F__  // GCC 12 widens in two halves, or through memory
[[gnu::always_inline]] inline Lanes load_all(const uint16_t* x) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return (Lanes)_mm512_slli_epi32(words, 16);
}

[[gnu::always_inline]] inline Lanes load_all(const int8_t* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
#else
[[gnu::always_inline]] inline Lanes load_all(const uint16_t* x) {
  ShortLanes halves;
  __builtin_memcpy(&halves, x, sizeof halves);
  return (Lanes)(__builtin_convertvector(halves, IntLanes) << 16);
}

[[gnu::always_inline]] inline Lanes load_all(const int8_t* x) {
  ByteLanes bytes;
  __builtin_memcpy(&bytes, x, sizeof bytes);
  return __builtin_convertvector(bytes, Lanes);
}
#endif

[[gnu::always_inline]] inline void store_all(float* y, Lanes lanes) { __builtin_memcpy(y, &lanes, sizeof lanes); }

// Halves to even.
[[gnu::always_inline]] inline ShortLanes to_bf16(Lanes x) {
  const WordLanes bits = (WordLanes)x;
  const WordLanes rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : WordLanes{} + 0x7fc0, ShortLanes);
}

[[gnu::always_inline]] inline Eight sum_halves(Lanes lanes) {
  Eight eight[2];
  __builtin_memcpy(eight, &lanes, sizeof lanes);
  return eight[0] + eight[1];
}

// a where it is larger (smaller), else b: that is what the instructions do, but GCC 12 does not find them.
#ifdef __AVX512F__
[[gnu::always_inline]] inline Lanes larger(Lanes a, Lanes b) { return (Lanes)_mm512_max_ps((__m512)a, (__m512)b); }
[[gnu::always_inline]] inline Lanes smaller(Lanes a, Lanes b) { return (Lanes)_mm512_min_ps((__m512)a, (__m512)b); }
#else
[[gnu::always_inline]] inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
[[gnu::always_inline]] inline Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }
#endif

// The first n lanes, the rest replaced.
[[gnu::always_inline]] inline Lanes keep_first(Lanes x, int64_t n, float rest) {
  const IntLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < static_cast<int32_t>(n < kLanes ? n : kLanes) ? x : Lanes{} + rest;
}

// 2^x of a whole x, given x + 1.5 * 2^23. A copy by memcpy would go through memory.
[[gnu::always_inline]] inline Lanes power_of_two(Lanes shifted) {
  return (Lanes)((((IntLanes)shifted - 0x4b400000) + 127) << 23);
}

// Of two vectors each, lanes that are STRIDE apart: their sum in the first, the first less the second in the second.
template <int STRIDE>
[[gnu::always_inline]] inline void butterfly(Lanes* x) {
  IntLanes partner;
  Lanes sign;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    partner[i] = i ^ STRIDE;
    sign[i] = i & STRIDE ? -1.0f : 1.0f;
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Lanes other = shuffle(x[i], x[i], partner);
#ifdef __AVX512F__  // the product is exact
    x[i] = (Lanes)_mm512_fmadd_ps((__m512)x[i], (__m512)sign, (__m512)other);
#else
    x[i] = other + x[i] * sign;
#endif
  }
}

}  // namespace
}  // namespace tinyllm
