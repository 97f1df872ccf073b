// The step of adamw8bit.h, vectors of 16. The tables of 256 numbers lie in 16 registers: eight
// permutations of two each and seven choices by the index's upper bits read 16 numbers.
#include <immintrin.h>

#include "adamw8bit_blocks.h"

namespace tinyllm {
namespace {

void look_up(const float* table, const uint8_t* index, float* y, int64_t n) {
  __m512 part[16];
  for (int i = 0; i < 16; ++i) part[i] = _mm512_loadu_ps(table + 16 * i);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 kept = static_cast<__mmask16>((n - i < 16 ? 1u << (n - i) : 0x10000u) - 1);
    const __m512i at = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(kept, index + i));
    const auto bit = [&](int b) { return _mm512_test_epi32_mask(at, _mm512_set1_epi32(b)); };
    const __mmask16 bit5 = bit(32), bit6 = bit(64), bit7 = bit(128);
    const auto read32 = [&](int p) { return _mm512_permutex2var_ps(part[p], at, part[p + 1]); };
    const auto read64 = [&](int p) { return _mm512_mask_blend_ps(bit5, read32(p), read32(p + 2)); };
    const auto read128 = [&](int p) { return _mm512_mask_blend_ps(bit6, read64(p), read64(p + 4)); };
    _mm512_mask_storeu_ps(y + i, kept, _mm512_mask_blend_ps(bit7, read128(0), read128(8)));
  }
}

}  // namespace

void adamw8bit_avx512(const AdamW8bit& s, int64_t first, int64_t last) { step_blocks<look_up>(s, first, last); }

}  // namespace tinyllm
