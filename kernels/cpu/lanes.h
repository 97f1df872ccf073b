// Float arithmetic of one decoding step, 16 numbers at a time; included by every instruction set.
//
// Each sum has 16 partial sums that are added in one fixed order, and no product is contracted into
// a sum, so all instruction sets give the same bits. Everything is static: see w8a8.h.
#pragma once
#if defined(__AVX2__) && !defined(__AVX512F__)
#include "lanes_avx2.h"
#else
#include "lanes_vector.h"
#endif

namespace tinyllm {
namespace {

typedef float Four __attribute__((vector_size(16)));

// fp32, bf16 (the upper half of an fp32 number) or INT8 without its scale; zeros behind the n-th. Two
// branches: with one copy of variable size even whole vectors go through memory.
template <class T>
[[gnu::always_inline]] inline Lanes load(const T* x, int64_t n) {
  if (n >= kLanes) return load_all(x);
  T rest[kLanes] = {};
  __builtin_memcpy(rest, x, static_cast<size_t>(n) * sizeof(T));
  return load_all(rest);
}

[[gnu::always_inline]] inline void store(float* y, Lanes lanes, int64_t n) {
  if (n >= kLanes) return store_all(y, lanes);
  float all[kLanes];
  store_all(all, lanes);
  __builtin_memcpy(y, all, static_cast<size_t>(n) * sizeof(float));
}

// The halves are added until one number is left.
[[gnu::always_inline]] inline float sum_lanes(Lanes lanes) {
  const Eight eight = sum_halves(lanes);
  Four four[2];
  __builtin_memcpy(four, &eight, sizeof four);
  four[0] += four[1];
  return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

// The products of two rows, in 16 sums.
template <class T>
[[gnu::always_inline]] inline Lanes products(const float* a, const T* b, int64_t n) {
  Lanes sum = load(a, n) * load(b, n);
  for (int64_t i = kLanes; i < n; i += kLanes) sum += load(a + i, n - i) * load(b + i, n - i);
  return sum;
}

template <class T>
[[gnu::always_inline]] inline float dot(const float* a, const T* b, int64_t n) {
  return sum_lanes(products(a, b, n));
}

// exp between -87 and 88, constant beyond: 2^round(x / ln 2) times the Taylor series of the rest, |rest| <= ln(2) / 2,
// up to the seventh power (relative error below 1e-8, less than the rounding of fp32).
[[gnu::always_inline]] inline Lanes exp_lanes(Lanes x) {
  x = smaller(Lanes{} + 88.0f, larger(Lanes{} - 87.0f, x));
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
  return series * power_of_two(shifted);
}

void add(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(y + i, n - i) + load(x + i, n - i), n - i);
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

void narrow(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const ShortLanes halves = to_bf16(load(x + i, n - i));
    __builtin_memcpy(y + i, &halves, static_cast<size_t>(n - i < kLanes ? n - i : kLanes) * sizeof *y);
  }
}

void widen(const uint16_t* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(x + i, n - i), n - i);
}

[[gnu::always_inline]] inline Lanes hadamard_16(Lanes x) {
  return butterfly<1>(butterfly<2>(butterfly<4>(butterfly<8>(x)))) * 0.17677669529663687f;  // 1 / sqrt(32)
}

void hadamard(float* x) {
  const Lanes a = load(x, kLanes), b = load(x + kLanes, kLanes);
  store(x, hadamard_16(a + b), kLanes);
  store(x + kLanes, hadamard_16(a - b), kLanes);
}

void swiglu(const float* gate, const float* up, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Lanes g = load(gate + i, n - i), u = load(up + i, n - i);
    store(y + i, g / (1.0f + exp_lanes(0.0f - g)) * u, n - i);
  }
}

}  // namespace
}  // namespace tinyllm
