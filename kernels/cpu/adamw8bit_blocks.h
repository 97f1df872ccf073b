// The step of adamw8bit.h for some blocks; included by each instruction set. Static: see w8a8.h.
//
// Tables are read by one load per number into a buffer, everything else is loops that the compiler
// turns into vectors: gathers take 45 cycles for 16 numbers on Zen 4, 16 loads and stores take 16.
#pragma once
#include <cstddef>

#include "adamw8bit.h"

namespace tinyllm {
namespace {

void quantize(const float* x, int64_t n, const StateCode& code, uint8_t* q, float* scale) {
  uint32_t most = 0;  // magnitudes are ordered like their bits
  uint32_t bits[kStateBlock];
  __builtin_memcpy(bits, x, static_cast<std::size_t>(n) * sizeof *x);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = bits[i] & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  float largest;
  __builtin_memcpy(&largest, &most, sizeof largest);
  *scale = largest >= kTinyScale ? largest : 0.0f;
  const float inverse = largest >= kTinyScale ? 1.0f / largest : 0.0f;
  float scaled[kStateBlock];
  int32_t bucket[kStateBlock];
  for (int64_t i = 0; i < n; ++i) scaled[i] = x[i] * inverse;
  __builtin_memcpy(bits, scaled, static_cast<std::size_t>(n) * sizeof *bits);
  for (int64_t i = 0; i < n; ++i) {
    int32_t at = static_cast<int32_t>((bits[i] & 0x7fffffff) >> 15) - (kLowestExponent << 8);
    at = at < 0 ? 0 : at;
    at = at > kBuckets - 1 ? kBuckets - 1 : at;
    bucket[i] = at + (static_cast<int32_t>(bits[i]) < 0 ? kBuckets : 0);
  }
  uint8_t first[kStateBlock];
  float middle[kStateBlock];
  for (int64_t i = 0; i < n; ++i) {
    first[i] = code.first[bucket[i]];
    middle[i] = code.middle[first[i]];
  }
  for (int64_t i = 0; i < n; ++i)
    q[i] = static_cast<uint8_t>(first[i] + (scaled[i] > middle[i] ? 1 : 0));
}

void step_blocks(const AdamW8bit& s, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t at = block * kStateBlock;
    const int64_t n = s.n - at < kStateBlock ? s.n - at : kStateBlock;
    const float m_scale = s.m_scale[block], v_scale = s.v_scale[block];
    const float* g = s.g + at;
    float* p = s.p + at;
    float m[kStateBlock], v[kStateBlock];
    for (int64_t i = 0; i < n; ++i) m[i] = s.signed_code.value[s.m[at + i]];
    for (int64_t i = 0; i < n; ++i) v[i] = s.unsigned_code.value[s.v[at + i]];
    for (int64_t i = 0; i < n; ++i) {
      m[i] = m[i] * m_scale * s.beta1 + g[i] * s.rest1;
      v[i] = v[i] * v_scale * s.beta2 + g[i] * g[i] * s.rest2;
      const float update = m[i] / (__builtin_sqrtf(v[i]) * s.inverse2 + s.eps);
      p[i] = p[i] * s.decay - s.rate * update;
    }
    quantize(m, n, s.signed_code, s.m + at, s.m_scale + block);
    quantize(v, n, s.unsigned_code, s.v + at, s.v_scale + block);
  }
}

}  // namespace
}  // namespace tinyllm
