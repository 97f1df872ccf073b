// What the tiles of INT8 and of 4-bit weights share, by instruction set. Everything is static: see w8a8.h.
#pragma once
#include <immintrin.h>

#include "w8a8.h"

namespace tinyllm {
namespace {

// The sum of 32 unsigned bytes.
[[gnu::always_inline]] inline int64_t sum_bytes(__m256i bytes) {
  const __m256i sums = _mm256_sad_epu8(bytes, _mm256_setzero_si256());
  const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return _mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
}

#ifdef __AVX512F__

__mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1u); }

// What a masked store wrote is slow to read soon after: whole registers go without.
[[gnu::always_inline]] inline void store_lanes(float* y, __m512 x, __mmask16 lanes) {
  if (lanes == 0xffff) {
    _mm512_storeu_ps(y, x);
  } else {
    _mm512_mask_storeu_ps(y, lanes, x);
  }
}

#ifdef __AVX512VNNI__
// Adds four products of unsigned by signed bytes to each lane. The intrinsic would do, but GCC 12 then keeps every
// sum in memory as well and stores it in each step, at half the speed; "+v" leaves it no choice.
[[gnu::always_inline]] inline void multiply_add(__m512i& sum, __m512i of_unsigned, __m512i of_signed) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(of_unsigned), "v"(of_signed));
}
#endif

#else

// The first n of 8 numbers, none if n is negative.
void store_first(float* y, __m256 x, int64_t n) {
  if (n >= 8) {
    _mm256_storeu_ps(y, x);
  } else if (n > 0) {
    alignas(32) float all[8];
    _mm256_store_ps(all, x);
    __builtin_memcpy(y, all, static_cast<size_t>(n) * sizeof(float));
  }
}

#endif

}  // namespace
}  // namespace tinyllm
