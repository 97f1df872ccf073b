// Attention of neighbouring rows of one sequence, a prompt's: what is read of a head serves kTogether of them.
//
// Keys and values are in fp32, the keys side by side, so that a score needs no sum across a register. All numbers are
// added in the order of attend.h: both give the same bits.
#pragma once
#include "arena.h"
#include "attend.h"

namespace tinyllm {
namespace {

typedef int32_t EightPlaces __attribute__((vector_size(32)));

[[gnu::always_inline]] inline Eight load_eight(const float* x) {
  Eight y;
  __builtin_memcpy(&y, x, sizeof y);
  return y;
}

[[gnu::always_inline]] inline Eight load_eight(const uint16_t* x) {
  typedef uint16_t Halves __attribute__((vector_size(16)));
  Halves halves;
  __builtin_memcpy(&halves, x, sizeof halves);
  return (Eight)(__builtin_convertvector(halves, EightPlaces) << 16);
}

[[gnu::always_inline]] inline Eight load_eight(const int8_t* x) {
  typedef int8_t Bytes __attribute__((vector_size(8)));
  Bytes bytes;
  __builtin_memcpy(&bytes, x, sizeof bytes);
  return __builtin_convertvector(bytes, Eight);
}

// One step of the transpose of 8 x 8 numbers: squares of SIDE change places across the diagonal.
template <int SIDE>
[[gnu::always_inline]] inline void exchange(Eight* rows) {
  EightPlaces upper, lower;  // 0 to 7: of the first, 8 to 15: of the second row
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    upper[i] = i & SIDE ? 8 + i - SIDE : i;
    lower[i] = i & SIDE ? 8 + i : i + SIDE;
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    if (i & SIDE) continue;
    const Eight a = rows[i], b = rows[i + SIDE];
    rows[i] = shuffle(a, b, upper);
    rows[i + SIDE] = shuffle(a, b, lower);
  }
}

// Numbers [i, i + 8) of the keys [s, s + 8), zeros behind the last, to their places in a block.
template <class T>
[[gnu::always_inline]] inline void transpose_eight(const T* keys, int64_t stride, int64_t n_keys, int64_t n,
                                                   float* block) {
  Eight rows[8] = {};
#pragma GCC unroll 8
  for (int key = 0; key < 8; ++key) {
    if (key >= n_keys) continue;
    if (n >= 8) {
      rows[key] = load_eight(keys + key * stride);
    } else {
      T rest[8] = {};
      __builtin_memcpy(rest, keys + key * stride, static_cast<size_t>(n) * sizeof(T));
      rows[key] = load_eight(rest);
    }
  }
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    if (i < n) __builtin_memcpy(block + i * kLanes, &rows[i], sizeof(Eight));
}

template <class T>
void open_typed(const CachedHead& cached, int64_t d_head, float* keys, float* values) {
  for (int64_t s = 0; s < cached.n_keys; s += 8)
    for (int64_t i = 0; i < d_head; i += 8)
      transpose_eight(static_cast<const T*>(cached.keys) + s * cached.stride + i, cached.stride, cached.n_keys - s,
                      d_head - i, keys + s / kLanes * d_head * kLanes + i * kLanes + s % kLanes);
  for (int64_t s = 0; s < cached.n_keys; ++s)
    for (int64_t i = 0; i < d_head; i += kLanes)
      store(values + s * d_head + i, load(static_cast<const T*>(cached.values) + s * cached.stride + i, d_head - i),
            d_head - i);
}

void open_head(const CachedHead& cached, int64_t d_head, float* keys, float* values) {
  switch (cached.stored) {
    case Stored::kFloat: return open_typed<float>(cached, d_head, keys, values);
    case Stored::kBf16: return open_typed<uint16_t>(cached, d_head, keys, values);
    case Stored::kInt8: return open_typed<int8_t>(cached, d_head, keys, values);
  }
}

// The sums of q k over the numbers first, first + 16, ... for ROWS queries and the 16 keys of a block.
template <int ROWS>
[[gnu::always_inline]] inline void column(const float* q, int64_t q_stride, const float* block, int64_t first,
                                          int64_t d_head, Lanes* sums) {
  const auto products = [&](int64_t i, Lanes* y) {
    const Lanes keys = load_all(block + i * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) y[r] = keys * q[r * q_stride + i];
  };
  if (first < d_head) {
    products(first, sums);
  } else {
    for (int r = 0; r < ROWS; ++r) sums[r] = Lanes{};
  }
  for (int64_t i = first + kLanes; i < d_head; i += kLanes) {
    Lanes some[ROWS];
    products(i, some);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) sums[r] += some[r];
  }
}

// The products of ROWS queries with the 16 keys of a block; sums have the order of `dot`.
template <int ROWS>
[[gnu::always_inline]] inline void dots(const float* q, int64_t q_stride, const float* block, int64_t d_head,
                                        Lanes* y) {
  Lanes fours[4][ROWS];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    Lanes a[ROWS], b[ROWS];
    column<ROWS>(q, q_stride, block, j, d_head, fours[j]);
    column<ROWS>(q, q_stride, block, j + 8, d_head, a);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) fours[j][r] += a[r];
    column<ROWS>(q, q_stride, block, j + 4, d_head, a);
    column<ROWS>(q, q_stride, block, j + 12, d_head, b);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) fours[j][r] += a[r] + b[r];
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) y[r] = (fours[0][r] + fours[2][r]) + (fours[1][r] + fours[3][r]);
}

// `weigh` of attend.h for ROWS queries, of which each sees one key more than the one before.
template <int ROWS, int SLICES>
[[gnu::always_inline]] inline void weigh_rows(const float* values, int64_t stride, const float* weights,
                                              int64_t weights_stride, int64_t n_keys, const float* factors,
                                              int64_t n, float* y, int64_t y_stride) {
  Lanes sums[2][ROWS][SLICES] = {};  // even and odd positions
  const int64_t shared = n_keys / 2 * 2;
  for (int64_t s = 0; s < shared; s += 2)
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd)
#pragma GCC unroll 4
      for (int i = 0; i < SLICES; ++i) {
        const Lanes some = load(values + (s + odd) * stride + i * kLanes, n - i * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) sums[odd][r][i] += some * weights[r * weights_stride + s + odd];
      }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int last = 0; last < ROWS; ++last) {  // at most one of all rows, and r more
      const int64_t s = shared + last;
      if (s >= n_keys + r) continue;
#pragma GCC unroll 4
      for (int i = 0; i < SLICES; ++i)
        sums[last % 2][r][i] +=
            load(values + s * stride + i * kLanes, n - i * kLanes) * weights[r * weights_stride + s];
    }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < SLICES; ++i)
      store(y + r * y_stride + i * kLanes, (sums[0][r][i] + sums[1][r][i]) * factors[r], n - i * kLanes);
}

// The first of ROWS queries sees n_keys keys.
template <int ROWS>
void attend_some(const float* q, int64_t q_stride, const OpenHead& head, int64_t n_keys, int64_t d_head,
                 float* scores, float* y, int64_t y_stride) {
  const int64_t most = n_keys + ROWS - 1, width = round_up(most, kLanes);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d_head));
  for (int64_t s = 0; s < most; s += kLanes) {
    Lanes some[ROWS];
    dots<ROWS>(q, q_stride, head.keys + s * d_head, d_head, some);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      if (head.key_scale != nullptr) some[r] *= load(head.key_scale + s, most - s);
      store_all(scores + r * width + s, some[r] * scale);
    }
  }
  float factors[ROWS];
  softmax<ROWS>(scores, width, n_keys, head.value_scale, factors);
  int64_t i = 0;
  for (; i + 2 * kLanes <= d_head; i += 2 * kLanes)
    weigh_rows<ROWS, 2>(head.values + i, d_head, scores, width, n_keys, factors, 2 * kLanes, y + i, y_stride);
  for (; i < d_head; i += kLanes)
    weigh_rows<ROWS, 1>(head.values + i, d_head, scores, width, n_keys, factors, d_head - i, y + i, y_stride);
}

void attend_rows(const float* q, int64_t q_stride, int64_t rows, const OpenHead& head, int64_t n_keys,
                 int64_t d_head, float* scores, float* y, int64_t y_stride) {
  for (; rows >= kTogether; rows -= kTogether, n_keys += kTogether) {
    attend_some<kTogether>(q, q_stride, head, n_keys, d_head, scores, y, y_stride);
    q += kTogether * q_stride;
    y += kTogether * y_stride;
  }
  for (; rows > 0; --rows, q += q_stride, y += y_stride, ++n_keys)
    attend_some<1>(q, q_stride, head, n_keys, d_head, scores, y, y_stride);
}

}  // namespace
}  // namespace tinyllm
