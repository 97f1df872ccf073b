// Float arithmetic of one decoding step, 16 numbers at a time; included by every instruction set.
//
// Each sum has 16 partial sums that are added in one fixed order, and no product is contracted into
// a sum, so all instruction sets give the same bits. Everything is static: see w8a8.h.
#pragma once
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "w8a8.h"

namespace tinyllm {
namespace {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t WordLanes __attribute__((vector_size(64)));
typedef uint16_t ShortLanes __attribute__((vector_size(32)));
typedef int8_t ByteLanes __attribute__((vector_size(16)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));

[[gnu::always_inline]] inline Lanes load(const float* x, int64_t n) {
  Lanes lanes = {};
  if (n >= kLanes) {
    __builtin_memcpy(&lanes, x, sizeof lanes);
  } else {
    __builtin_memcpy(&lanes, x, static_cast<size_t>(n) * sizeof(float));
  }
  return lanes;
}

// bf16: the upper half of an fp32 number.
[[gnu::always_inline]] inline Lanes load(const uint16_t* x, int64_t n) {
#ifdef __AVX512F__  // GCC 12 widens in two halves
  if (n >= kLanes) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    return (Lanes)_mm512_slli_epi32(words, 16);
  }
#endif
  ShortLanes halves = {};
  if (n >= kLanes) {
    __builtin_memcpy(&halves, x, sizeof halves);
  } else {
    __builtin_memcpy(&halves, x, static_cast<size_t>(n) * sizeof(uint16_t));
  }
  return (Lanes)(__builtin_convertvector(halves, IntLanes) << 16);
}

// INT8, without its scale.
[[gnu::always_inline]] inline Lanes load(const int8_t* x, int64_t n) {
  ByteLanes bytes = {};
  if (n >= kLanes) {
    __builtin_memcpy(&bytes, x, sizeof bytes);
  } else {
    __builtin_memcpy(&bytes, x, static_cast<size_t>(n));
  }
#if defined(__AVX512F__)  // GCC 12 goes through memory
  return (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes));
#elif defined(__AVX2__)
  const __m128i half = (__m128i)bytes;
  const __m256 eight[2] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(half)),
                           _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(half, 8)))};
  Lanes lanes;
  __builtin_memcpy(&lanes, eight, sizeof lanes);
  return lanes;
#else
  return __builtin_convertvector(bytes, Lanes);
#endif
}

// Two calls of memcpy: with one of variable size even whole vectors go through memory.
[[gnu::always_inline]] inline void store(float* y, Lanes lanes, int64_t n) {
  if (n >= kLanes) {
    __builtin_memcpy(y, &lanes, sizeof lanes);
  } else {
    __builtin_memcpy(y, &lanes, static_cast<size_t>(n) * sizeof(float));
  }
}

// The halves are added until one number is left.
[[gnu::always_inline]] inline float sum_lanes(Lanes lanes) {
  Eight eight[2];
  __builtin_memcpy(eight, &lanes, sizeof lanes);
  eight[0] += eight[1];
  Four four[2];
  __builtin_memcpy(four, eight, sizeof four);
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

// The largest number, whatever their order; NaN is not looked at.
[[gnu::always_inline]] inline float largest(const float* x, int64_t n) {
  Lanes most = Lanes{} - __builtin_inff();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Lanes some = load(x + i, kLanes);
    most = some > most ? some : most;
  }
  Eight eight[2];
  __builtin_memcpy(eight, &most, sizeof most);
  eight[0] = eight[1] > eight[0] ? eight[1] : eight[0];
  Four four[2];
  __builtin_memcpy(four, eight, sizeof four);
  four[0] = four[1] > four[0] ? four[1] : four[0];
  float one = four[0][0];
  for (int lane = 1; lane < 4; ++lane) one = four[0][lane] > one ? four[0][lane] : one;
  for (; i < n; ++i) one = x[i] > one ? x[i] : one;
  return one;
}

template <class T>
[[gnu::always_inline]] inline float dot(const float* a, const T* b, int64_t n) {
  return sum_lanes(products(a, b, n));
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
  const IntLanes exponents = (((IntLanes)shifted - 0x4b400000) + 127) << 23;
  return series * (Lanes)exponents;  // a copy by memcpy would go through memory
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
    const Lanes some = load(x + i, n - i);
    const WordLanes bits = (WordLanes)some;
    const WordLanes rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // halves to even
    const ShortLanes halves = __builtin_convertvector(some == some ? rounded : WordLanes{} + 0x7fc0, ShortLanes);
    __builtin_memcpy(y + i, &halves, static_cast<size_t>(n - i < kLanes ? n - i : kLanes) * sizeof *y);
  }
}

void widen(const uint16_t* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(x + i, n - i), n - i);
}

// y [16 SLICES] = sum of the weighted values, even and odd positions apart; at most `n` numbers.
// Meanwhile as many rows of `next` are fetched.
template <int SLICES, class T>
[[gnu::always_inline]] inline void weigh(const T* values, const T* next, int64_t stride, const float* weights,
                                         int64_t n_keys, float factor, int64_t n, float* y) {
  constexpr int kLine = 64 / sizeof(T);
  Lanes even[SLICES] = {}, odd[SLICES] = {};
  int64_t s = 0;
  for (; s + 2 <= n_keys; s += 2) {
    if (next != nullptr)
      for (int i = 0; i < SLICES * kLanes; i += kLine) {
        __builtin_prefetch(next + s * stride + i);
        __builtin_prefetch(next + (s + 1) * stride + i);
      }
#pragma GCC unroll 4
    for (int i = 0; i < SLICES; ++i) {
      even[i] += load(values + s * stride + i * kLanes, n - i * kLanes) * weights[s];
      odd[i] += load(values + (s + 1) * stride + i * kLanes, n - i * kLanes) * weights[s + 1];
    }
  }
  if (s < n_keys)
#pragma GCC unroll 4
    for (int i = 0; i < SLICES; ++i)
      even[i] += load(values + s * stride + i * kLanes, n - i * kLanes) * weights[s];
#pragma GCC unroll 4
  for (int i = 0; i < SLICES; ++i) store(y + i * kLanes, (even[i] + odd[i]) * factor, n - i * kLanes);
}

// The products of q with 16 keys. All sums of a lane are those of `dot`: halves of one vector are
// added to each other there, halves of two vectors side by side here.
#ifdef __AVX512F__
template <class T>
[[gnu::always_inline]] inline Lanes dot_with_16(const float* q, const T* keys, int64_t stride, int64_t n) {
  __m512 part[kLanes], sum[8];
#pragma GCC unroll 16
  for (int key = 0; key < kLanes; ++key) {
    part[key] = (__m512)products(q, keys, n);
    keys += stride;
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // keys j and 4 + j, and 8 + j and 12 + j: their eight sums each
    const int a = i / 2 + i % 2 * 8, b = a + 4;
    sum[i] = _mm512_add_ps(_mm512_shuffle_f32x4(part[a], part[b], 0x44),
                           _mm512_shuffle_f32x4(part[a], part[b], 0xee));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // keys j, 4 + j, 8 + j, 12 + j: four sums each
    const __m512 a = sum[2 * j], b = sum[2 * j + 1];
    part[j] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
#pragma GCC unroll 2
  for (int j = 0; j < 4; j += 2)
    part[j] = _mm512_add_ps(_mm512_shuffle_ps(part[j], part[j + 1], 0x44),
                            _mm512_shuffle_ps(part[j], part[j + 1], 0xee));
  return (Lanes)_mm512_add_ps(_mm512_shuffle_ps(part[0], part[2], 0x88),
                              _mm512_shuffle_ps(part[0], part[2], 0xdd));
}
#else
template <class T>
[[gnu::always_inline]] inline Lanes dot_with_16(const float* q, const T* keys, int64_t stride, int64_t n) {
  Lanes all;
  for (int key = 0; key < kLanes; ++key) all[key] = dot(q, keys + key * stride, n);
  return all;
}
#endif

// D > 0: the width, known when this is compiled.
template <int64_t D, class T>
[[gnu::always_inline]] inline void attend_to(const float* q, const CachedHead& cached, int64_t width,
                                             float* scores, float* y) {
  const int64_t d_head = D > 0 ? D : width;
  const auto* keys = static_cast<const T*>(cached.keys);
  const auto* values = static_cast<const T*>(cached.values);
  const auto* next = static_cast<const T*>(cached.next_keys);
  const int64_t n_keys = cached.n_keys, stride = cached.stride;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d_head));
  constexpr bool is_int8 = sizeof(T) == 1;
  int64_t s = 0;
  for (; s + kLanes <= n_keys; s += kLanes) {
    for (int64_t key = s; key < s + kLanes; ++key)  // their values are wanted next
      for (int64_t line = 0; line < d_head; line += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(values + key * stride + line);
    Lanes some = dot_with_16(q, keys + s * stride, stride, d_head);
    if constexpr (is_int8) some *= load(cached.key_scale + s, kLanes);
    store(scores + s, some * scale, kLanes);
  }
  for (; s < n_keys; ++s) {
    float one = dot(q, keys + s * stride, d_head);
    if constexpr (is_int8) one *= cached.key_scale[s];
    scores[s] = one * scale;
  }
  const float most = largest(scores, n_keys);
  Lanes total = {};
  for (s = 0; s < n_keys; s += kLanes) {
    const int64_t n = n_keys - s;
    store(scores + s, exp_lanes(load(scores + s, n) - most), n);
    const Lanes weights = load(scores + s, n);
    total += weights;
    if constexpr (is_int8) store(scores + s, weights * load(cached.value_scale + s, n), n);
  }
  const float factor = 1.0f / sum_lanes(total);
  int64_t i = 0;
  for (; i + 4 * kLanes <= d_head; i += 4 * kLanes)
    weigh<4>(values + i, next == nullptr ? next : next + i, stride, scores, n_keys, factor, 4 * kLanes, y + i);
  for (; i + 2 * kLanes <= d_head; i += 2 * kLanes)
    weigh<2>(values + i, next == nullptr ? next : next + i, stride, scores, n_keys, factor, 2 * kLanes, y + i);
  for (; i < d_head; i += kLanes)
    weigh<1>(values + i, next == nullptr ? next : next + i, stride, scores, n_keys, factor, d_head - i, y + i);
}

template <class T>
[[gnu::always_inline]] inline void attend_typed(const float* q, const CachedHead& cached, int64_t d_head,
                                                float* scores, float* y) {
  switch (d_head) {
    case 32: return attend_to<32, T>(q, cached, d_head, scores, y);
    case 64: return attend_to<64, T>(q, cached, d_head, scores, y);
    case 128: return attend_to<128, T>(q, cached, d_head, scores, y);
    default: return attend_to<0, T>(q, cached, d_head, scores, y);
  }
}

void attend(const float* q, const CachedHead& cached, int64_t d_head, float* scores, float* y) {
  switch (cached.stored) {
    case Stored::kFloat: return attend_typed<float>(q, cached, d_head, scores, y);
    case Stored::kBf16: return attend_typed<uint16_t>(q, cached, d_head, scores, y);
    case Stored::kInt8: return attend_typed<int8_t>(q, cached, d_head, scores, y);
  }
}

// Lanes that are STRIDE apart: their sum in the first, the first less the second in the second.
template <int STRIDE>
[[gnu::always_inline]] inline Lanes butterfly(Lanes x) {
  IntLanes partner, flip;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    partner[i] = i ^ STRIDE;
    flip[i] = i & STRIDE ? INT32_MIN : 0;  // the sign bit
  }
  return __builtin_shuffle(x, partner) + (Lanes)((IntLanes)x ^ flip);
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
