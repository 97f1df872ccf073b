// Attention of one query over its cached keys and values; included by every instruction set.
//
//   scores = q K^T / sqrt(d_head)      weights = exp(scores - the largest)      y = (weights V) / (their sum)
//
// Keys are read once, 16 at a time, then values once, two at a time; all scores of the query lie between. K and V are
// [n_keys][d_head] with a stride, fp32, bf16 or INT8 with a scale per key. Sums have the order of lanes.h.
#pragma once
#include "lanes.h"

namespace tinyllm {
namespace {

// Brings a line into the second cache. Into the first one fewer are under way at once than memory needs: attention of a
// token then took 40 instead of 23 us a layer on one thread, 21 instead of 18 on two (d 768).
[[gnu::always_inline]] inline void fetch(const void* line) { __builtin_prefetch(line, 0, 2); }

// The largest number, whatever their order; NaN is not looked at. Whole vectors can be read.
[[gnu::always_inline]] inline float largest(const float* x, int64_t n) {
  const float least = -__builtin_inff();
  Lanes most = Lanes{} + least;
  for (int64_t i = 0; i < n; i += kLanes) most = larger(keep_first(load_all(x + i), n - i, least), most);
  Eight eight[2];
  __builtin_memcpy(eight, &most, sizeof most);
  eight[0] = eight[1] > eight[0] ? eight[1] : eight[0];
  Four four[2];
  __builtin_memcpy(four, eight, sizeof four);
  four[0] = four[1] > four[0] ? four[1] : four[0];
  float one = four[0][0];
  for (int lane = 1; lane < 4; ++lane) one = four[0][lane] > one ? four[0][lane] : one;
  return one;
}

// scores = exp(scores - the largest), times the scales if there are any; factors = 1 / the sum without them. For ROWS
// queries with `width` scores each, of which each sees one key more than the one before; whole vectors can be written.
template <int ROWS>
[[gnu::always_inline]] inline void softmax(float* scores, int64_t width, int64_t n_keys, const float* value_scale,
                                           float* factors) {
  float most[ROWS];
  for (int r = 0; r < ROWS; ++r) most[r] = largest(scores + r * width, n_keys + r);
  Lanes total[ROWS] = {};
  for (int64_t s = 0; s < n_keys + ROWS - 1; s += kLanes) {
    Lanes x[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) x[r] = load_all(scores + r * width + s) - most[r];
    exp_lanes<ROWS>(x);
    const int64_t n = n_keys - s;
    if (n < kLanes)
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) x[r] = keep_first(x[r], n + r, 0.0f);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      total[r] += x[r];
      if (value_scale != nullptr) x[r] *= load(value_scale + s, n + ROWS - 1);
      store_all(scores + r * width + s, x[r]);
    }
  }
  for (int r = 0; r < ROWS; ++r) factors[r] = 1.0f / sum_lanes(total[r]);
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
        fetch(next + s * stride + i);
        fetch(next + (s + 1) * stride + i);
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
  float all[kLanes];
  for (int key = 0; key < kLanes; ++key) all[key] = dot(q, keys + key * stride, n);
  return load_all(all);
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
        fetch(values + key * stride + line);
    Lanes some = dot_with_16(q, keys + s * stride, stride, d_head);
    if constexpr (is_int8) some *= load(cached.key_scale + s, kLanes);
    store(scores + s, some * scale, kLanes);
  }
  for (; s < n_keys; ++s) {
    float one = dot(q, keys + s * stride, d_head);
    if constexpr (is_int8) one *= cached.key_scale[s];
    scores[s] = one * scale;
  }
  float factor;
  softmax<1>(scores, 0, n_keys, is_int8 ? cached.value_scale : nullptr, &factor);
  int64_t i = 0;
  for (; i + kSlices * kLanes <= d_head; i += kSlices * kLanes)
    weigh<kSlices>(values + i, next == nullptr ? next : next + i, stride, scores, n_keys, factor, kSlices * kLanes,
                   y + i);
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

}  // namespace
}  // namespace tinyllm
