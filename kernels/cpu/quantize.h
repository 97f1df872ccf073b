// The rule by which a row becomes INT8 (`Isa::quantize` of w8a8.h). Everything is static: see there.
#pragma once
#include "w8a8.h"

namespace tinyllm {
namespace {

// The bits of |x|: integers in the order of the numbers, infinity and NaN above all.
[[gnu::always_inline]] inline uint32_t magnitude(const float* x) {
  uint32_t bits;
  __builtin_memcpy(&bits, x, sizeof bits);
  return bits & 0x7fffffffu;
}

// The scale of a row with this largest magnitude; its numbers are multiplied by `inverse`. Of a row without usable
// numbers `inverse` is 0, and q is filled.
[[gnu::always_inline]] inline float row_scale(uint32_t largest, int64_t k, int8_t* q, uint8_t flip, float* inverse) {
  float absmax;
  __builtin_memcpy(&absmax, &largest, sizeof absmax);
  const bool is_finite = largest < 0x7f800000u;
  if (!is_finite || absmax < kTinyAbsmax) {
    *inverse = 0.0f;
    __builtin_memset(q, flip, static_cast<size_t>(k));
    return is_finite ? 0.0f : __builtin_nanf("");
  }
  *inverse = 127.0f / absmax;
  return absmax / 127.0f;
}

}  // namespace
}  // namespace tinyllm
