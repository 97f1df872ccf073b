// Sixteen numbers in two registers of AVX2, with what lanes.h does to them.
//
// GCC 12 keeps vectors that are wider than a register in memory: attention was ten times slower.
#pragma once
#include <immintrin.h>

#include "shuffle.h"
#include "w8a8.h"

namespace tinyllm {
namespace {

typedef float Eight __attribute__((vector_size(32)));
typedef uint16_t ShortLanes __attribute__((vector_size(32)));
typedef uint32_t EightWords __attribute__((vector_size(32)));
typedef int32_t EightInts __attribute__((vector_size(32)));

struct Lanes {
  Eight low, high;
};

// Slices of 16 outputs that attention sums at a time, even and odd keys apart: 8 of 16 registers.
constexpr int kSlices = 2;

#define TINYLLM_LANES(op)                                                          \
  [[gnu::always_inline]] inline Lanes operator op(Lanes a, Lanes b) {              \
    return {a.low op b.low, a.high op b.high};                                     \
  }                                                                                \
  [[gnu::always_inline]] inline Lanes operator op(Lanes a, float b) {              \
    return {a.low op b, a.high op b};                                              \
  }                                                                                \
  [[gnu::always_inline]] inline Lanes operator op(float a, Lanes b) {              \
    return {a op b.low, a op b.high};                                              \
  }
TINYLLM_LANES(+)
TINYLLM_LANES(-)
TINYLLM_LANES(*)
TINYLLM_LANES(/)
#undef TINYLLM_LANES

[[gnu::always_inline]] inline void operator+=(Lanes& a, Lanes b) { a = a + b; }
[[gnu::always_inline]] inline void operator*=(Lanes& a, Lanes b) { a = a * b; }

[[gnu::always_inline]] inline Lanes load_all(const float* x) {
  return {(Eight)_mm256_loadu_ps(x), (Eight)_mm256_loadu_ps(x + 8)};
}

[[gnu::always_inline]] inline Lanes load_all(const uint16_t* x) {
  const auto eight = [](const uint16_t* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Eight)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
  };
  return {eight(x), eight(x + 8)};
}

[[gnu::always_inline]] inline Lanes load_all(const int8_t* x) {
  const auto eight = [](const int8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (Eight)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  };
  return {eight(x), eight(x + 8)};
}

[[gnu::always_inline]] inline void store_all(float* y, Lanes lanes) {
  _mm256_storeu_ps(y, (__m256)lanes.low);
  _mm256_storeu_ps(y + 8, (__m256)lanes.high);
}

// Halves to even.
[[gnu::always_inline]] inline ShortLanes to_bf16(Lanes x) {
  const auto eight = [](Eight half) {
    const EightWords bits = (EightWords)half;
    const EightWords rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (__m256i)(half == half ? rounded : EightWords{} + 0x7fc0);
  };
  const __m256i packed = _mm256_packus_epi32(eight(x.low), eight(x.high));  // 0..3, 8..11, 4..7, 12..15
  return (ShortLanes)_mm256_permute4x64_epi64(packed, 0xd8);
}

[[gnu::always_inline]] inline Eight sum_halves(Lanes lanes) { return lanes.low + lanes.high; }

// a where it is larger (smaller), else b.
[[gnu::always_inline]] inline Lanes larger(Lanes a, Lanes b) {
  return {a.low > b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
}
[[gnu::always_inline]] inline Lanes smaller(Lanes a, Lanes b) {
  return {a.low < b.low ? a.low : b.low, a.high < b.high ? a.high : b.high};
}

// The first n lanes, the rest replaced.
[[gnu::always_inline]] inline Lanes keep_first(Lanes x, int64_t n, float rest) {
  const EightInts lane = {0, 1, 2, 3, 4, 5, 6, 7};
  const auto count = static_cast<int32_t>(n < kLanes ? n : kLanes);
  return {lane < count ? x.low : Eight{} + rest, lane + 8 < count ? x.high : Eight{} + rest};
}

// 2^x of a whole x, given x + 1.5 * 2^23.
[[gnu::always_inline]] inline Lanes power_of_two(Lanes shifted) {
  const auto eight = [](Eight x) {
    const __m256i bias = _mm256_set1_epi32(127 - 0x4b400000);
    return (Eight)_mm256_slli_epi32(_mm256_add_epi32((__m256i)x, bias), 23);
  };
  return {eight(shifted.low), eight(shifted.high)};
}

// Of two vectors each, lanes that are STRIDE apart: their sum in the first, the first less the second in the second.
template <int STRIDE>
[[gnu::always_inline]] inline void butterfly(Lanes* x) {
  const auto eight = [](Eight half) {
    EightInts partner, flip;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      partner[i] = i ^ STRIDE;
      flip[i] = i & STRIDE ? INT32_MIN : 0;  // the sign bit
    }
    return shuffle(half, half, partner) + (Eight)((EightInts)half ^ flip);
  };
  for (int i = 0; i < 2; ++i) {
    const Lanes both = x[i];
    x[i] = STRIDE == 8 ? Lanes{both.low + both.high, both.low - both.high} : Lanes{eight(both.low), eight(both.high)};
  }
}

}  // namespace
}  // namespace tinyllm
