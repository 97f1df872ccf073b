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

// exp of N vectors, step by step together: one alone waits for itself. Between -87 and 88, constant beyond:
// 2^round(x / ln 2) times the Taylor series of the rest, |rest| <= ln(2) / 2, up to the seventh power (relative error
// below 1e-8, less than the rounding of fp32).
template <int N>
[[gnu::always_inline]] inline void exp_lanes(Lanes* x) {
  Lanes shifted[N], rest[N], series[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    x[i] = smaller(Lanes{} + 88.0f, larger(Lanes{} - 87.0f, x[i]));
    shifted[i] = x[i] * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to a whole
    const Lanes whole = shifted[i] - 12582912.0f;
    rest[i] = (x[i] - whole * 0.693359375f) - whole * -2.12194440e-4f;  // ln 2 in two parts
    series[i] = Lanes{} + 1.0f / 5040;
  }
  constexpr float kTerms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
#pragma GCC unroll 7
  for (int term = 0; term < 7; ++term)
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) series[i] = series[i] * rest[i] + kTerms[term];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = series[i] * power_of_two(shifted[i]);
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
    if (n - i >= kLanes) {
      __builtin_memcpy(y + i, &halves, sizeof halves);
    } else {
      __builtin_memcpy(y + i, &halves, static_cast<size_t>(n - i) * sizeof *y);
    }
  }
}

void gate(const float* gates, const float* ups, bool rotated, float* y) {
  static_assert(kHadamard == 2 * kLanes);
  const Lanes g[2] = {load_all(gates), load_all(gates + kLanes)};
  Lanes x[2] = {0.0f - g[0], 0.0f - g[1]};
  exp_lanes<2>(x);
  for (int i = 0; i < 2; ++i) x[i] = g[i] / (1.0f + x[i]) * load_all(ups + i * kLanes);
  if (rotated) {
    const Lanes sum = x[0] + x[1], difference = x[0] - x[1];
    x[0] = sum, x[1] = difference;
    butterfly<8>(x);
    butterfly<4>(x);
    butterfly<2>(x);
    butterfly<1>(x);
    for (int i = 0; i < 2; ++i) x[i] = x[i] * 0.17677669529663687f;  // 1 / sqrt(32)
  }
  for (int i = 0; i < 2; ++i) store_all(y + i * kLanes, x[i]);
}

}  // namespace
}  // namespace tinyllm
