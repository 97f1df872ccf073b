// Float arithmetic of one decoding step, 16 numbers at a time; included by every instruction set.
//
// Each sum has 16 partial sums that are added in one fixed order, and no product is contracted into
// a sum, so all instruction sets give the same bits. Everything is static: see w8a8.h.
#pragma once
#include "w8a8.h"

namespace tinyllm {
namespace {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));

[[gnu::always_inline]] inline Lanes load(const float* x, int64_t n) {
  Lanes lanes = {};
  if (n >= kLanes) {
    __builtin_memcpy(&lanes, x, sizeof lanes);
  } else {
    __builtin_memcpy(&lanes, x, static_cast<size_t>(n) * sizeof(float));
  }
  return lanes;
}

[[gnu::always_inline]] inline void store(float* y, Lanes lanes, int64_t n) {
  __builtin_memcpy(y, &lanes, static_cast<size_t>(n < kLanes ? n : kLanes) * sizeof(float));
}

[[gnu::always_inline]] inline float sum_lanes(Lanes lanes) {
  float part[kLanes];
  __builtin_memcpy(part, &lanes, sizeof part);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

[[gnu::always_inline]] inline float dot(const float* a, const float* b, int64_t n) {
  Lanes sum = {};
  for (int64_t i = 0; i < n; i += kLanes) sum += load(a + i, n - i) * load(b + i, n - i);
  return sum_lanes(sum);
}

// exp between -87 and 88, constant beyond: 2^round(x / ln 2) times the Taylor series of the rest, |rest| <= ln(2) / 2, up to
// the seventh power (relative error below 1e-8, less than the rounding of fp32).
[[gnu::always_inline]] inline Lanes exp_lanes(Lanes x) {
  x = x < -87.0f ? (Lanes{} - 87.0f) : x;
  x = x > 88.0f ? (Lanes{} + 88.0f) : x;
  const Lanes shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to a whole
  const Lanes whole = shifted - 12582912.0f;
  const Lanes rest = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;  // ln 2 in two parts
  Lanes series = Lanes{} + 1.0f / 5040;
  series = series * rest + 1.0f / 720;
  series = series * rest + 1.0f / 120;
  series = series * rest + 1.0f / 24;
  series = series * rest + 1.0f / 6;
  series = series * rest + 0.5f;
  series = series * rest + 1.0f;
  series = series * rest + 1.0f;
  IntLanes bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = ((bits - 0x4b400000) + 127) << 23;
  Lanes power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return series * power;
}

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
  const float mean = dot(x, x, n) / static_cast<float>(n);
  const float factor = 1.0f / __builtin_sqrtf(mean + eps);
  for (int64_t i = 0; i < n; i += kLanes)
    store(y + i, load(x + i, n - i) * factor * load(weight + i, n - i), n - i);
}

void rotate(float* x, const float* cosines, const float* sines, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    const Lanes a = load(x + i, n), b = load(x + half + i, n);
    const Lanes c = load(cosines + i, n), s = load(sines + i, n);
    store(x + i, a * c - b * s, n);
    store(x + half + i, b * c + a * s, n);
  }
}

void attend(const float* q, const float* k, int64_t k_stride, const float* v, int64_t v_stride,
            int64_t n_keys, int64_t d_head, float* scores, float* y) {
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d_head));
  float most = -__builtin_inff();
  for (int64_t s = 0; s < n_keys; ++s) {
    scores[s] = dot(q, k + s * k_stride, d_head) * scale;
    most = scores[s] > most ? scores[s] : most;
  }
  Lanes total = {};
  for (int64_t s = 0; s < n_keys; s += kLanes) {
    const int64_t n = n_keys - s;
    store(scores + s, exp_lanes(load(scores + s, n) - most), n);
    total += load(scores + s, n);
  }
  const float inverse = 1.0f / sum_lanes(total);
  for (int64_t i = 0; i < d_head; i += kLanes) {
    Lanes even = {}, odd = {};
    int64_t s = 0;
    for (; s + 2 <= n_keys; s += 2) {
      even += load(v + s * v_stride + i, d_head - i) * scores[s];
      odd += load(v + (s + 1) * v_stride + i, d_head - i) * scores[s + 1];
    }
    if (s < n_keys) even += load(v + s * v_stride + i, d_head - i) * scores[s];
    store(y + i, (even + odd) * inverse, d_head - i);
  }
}

void swiglu(const float* gate, const float* up, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Lanes g = load(gate + i, n - i), u = load(up + i, n - i);
    store(y + i, g / (1.0f + exp_lanes(0.0f - g)) * u, n - i);
  }
}

}  // namespace
}  // namespace tinyllm
