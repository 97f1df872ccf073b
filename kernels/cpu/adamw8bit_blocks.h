// The step of adamw8bit.h for some blocks; included by each instruction set. Static: see w8a8.h.
//
// Everything but the tables is loops that the compiler turns into vectors.
#pragma once
#include <cstddef>

#include "adamw8bit.h"

namespace tinyllm {
namespace {

// y[i] = table[index[i]], a table of 256 numbers.
using LookUp = void (*)(const float* table, const uint8_t* index, float* y, int64_t n);

template <LookUp look_up>
void quantize(const float* x, int64_t n, const StateCode& code, uint8_t* q, float* scale) {
  uint32_t most = 0;  // magnitudes are ordered like their bits
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    most = (bits & 0x7fffffff) > most ? bits & 0x7fffffff : most;
  }
  float largest;
  __builtin_memcpy(&largest, &most, sizeof largest);
  *scale = largest >= kTinyScale ? largest : 0.0f;
  const float inverse = largest >= kTinyScale ? 1.0f / largest : 0.0f;
  float scaled[kStateBlock], middle[kStateBlock];
  uint8_t first[kStateBlock];
  for (int64_t i = 0; i < n; ++i) {
    scaled[i] = x[i] * inverse;
    const float magnitude = __builtin_fabsf(scaled[i]);
    float below = magnitude * code.slope[0] + code.offset[0];
    for (int d = 1; d < kDecades; ++d) {
      const float line = magnitude * code.slope[d] + code.offset[d];
      below = line < below ? line : below;
    }
    below = below > 0.0f ? below : 0.0f;  // and where it is not a number
    const int32_t count = static_cast<int32_t>(below);
    const int32_t at = scaled[i] < 0.0f ? code.zero - 1 - count : code.zero + count;
    first[i] = static_cast<uint8_t>(at > 0 ? at : 0);
  }
  look_up(code.middle, first, middle, n);
  for (int64_t i = 0; i < n; ++i)
    q[i] = static_cast<uint8_t>(first[i] + (scaled[i] > middle[i] ? 1 : 0));
}

template <LookUp look_up>
void step_blocks(const AdamW8bit& s, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t at = block * kStateBlock;
    const int64_t n = s.n - at < kStateBlock ? s.n - at : kStateBlock;
    const float m_scale = s.m_scale[block], v_scale = s.v_scale[block];
    const float* g = s.g + at;
    float* p = s.p + at;
    float m[kStateBlock], v[kStateBlock];
    look_up(s.signed_code.value, s.m + at, m, n);
    look_up(s.unsigned_code.value, s.v + at, v, n);
    for (int64_t i = 0; i < n; ++i) {
      m[i] = m[i] * m_scale * s.beta1 + g[i] * s.rest1;
      v[i] = v[i] * v_scale * s.beta2 + g[i] * g[i] * s.rest2;
      const float update = m[i] / (__builtin_sqrtf(v[i]) * s.inverse2 + s.eps);
      p[i] = p[i] * s.decay - s.rate * update;
    }
    quantize<look_up>(m, n, s.signed_code, s.m + at, s.m_scale + block);
    quantize<look_up>(v, n, s.unsigned_code, s.v + at, s.v_scale + block);
  }
}

}  // namespace
}  // namespace tinyllm
