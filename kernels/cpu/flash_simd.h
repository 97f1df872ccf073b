// The two kinds of arithmetic that attention is written in, and the product of two small matrices.
//
// Both see operands as 32-bit words: one fp32 number, or two bf16 numbers that are neighbours along
// the dimension that is summed over (`kGroup` = 1 or 2). A step of a product takes one word of A,
// the same for all lanes, and a vector of words of B. Everything is static: see w8a8.h.
#pragma once
#include "flash.h"
#include "simd.h"

namespace tinyllm {
namespace {

#ifdef __AVX512BF16__
struct Bf16 {
  static constexpr int64_t kLanes = 16, kGroup = 2, kVectors = 4;
  typedef float Vec __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  using Operand = __m512bh;

  static Operand operand(const uint32_t* words) { return (__m512bh)_mm512_loadu_si512(words); }
  static Operand splat(const uint32_t* word) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(*word));
  }
  static Vec dot(Vec sum, Operand a, Operand b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
  static void store_row(uint32_t* words, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), (__m256i)_mm512_cvtneps_pbh((__m512)x));
  }
  // Two rows, interleaved: word i holds even[i] and odd[i].
  static void store_pair(uint32_t* words, Vec even, Vec odd) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
    _mm512_storeu_si512(words, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};
#endif

// A number that is known when the template is compiled.
template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls run with the Count of `vectors`, 1 to S::kVectors; of those that are more with that of S::kVectors.
template <class S, class Run>
[[gnu::always_inline]] inline void with_count(int64_t vectors, Run run) {
  static_assert(S::kVectors == 2 || S::kVectors == 4);
  if constexpr (S::kVectors == 4) {
    if (vectors >= 4) return run(Count<4>{});
    if (vectors == 3) return run(Count<3>{});
  }
  if (vectors >= 2) return run(Count<2>{});
  run(Count<1>{});
}

template <class S>
[[gnu::always_inline]] inline typename S::Ints load_ints(const int32_t* x) {
  typename S::Ints y;
  __builtin_memcpy(&y, x, sizeof y);
  return y;
}

// sum[r][v] += sum over steps s of a[r * a_row + s * a_step] * b[s * b_step + v-th vector].
template <class S, int R, int V>
[[gnu::always_inline]] inline void multiply(typename S::Vec (&sum)[R][V], const uint32_t* a,
                                            int64_t a_row, int64_t a_step, const uint32_t* b,
                                            int64_t b_step, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s) {
    typename S::Operand vectors[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) vectors[v] = S::operand(b + v * S::kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const typename S::Operand word = S::splat(a + r * a_row);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = S::dot(sum[r][v], word, vectors[v]);
    }
    a += a_step;
    b += b_step;
  }
}

// c [R][V vectors] = c * factor[r] + the product above.
template <class S, int R, int V>
void accumulate_tile(float* c, int64_t c_row, const float* factor, const uint32_t* a,
                     int64_t a_row, int64_t a_step, const uint32_t* b, int64_t b_step,
                     int64_t steps) {
  typename S::Vec sum[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sum[r][v] = load<S>(c + r * c_row + v * S::kLanes);
      if (factor != nullptr) sum[r][v] *= factor[r];
    }
  multiply<S, R, V>(sum, a, a_row, a_step, b, b_step, steps);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store<S>(c + r * c_row + v * S::kLanes, sum[r][v]);
}

// The same for `columns` columns, a multiple of 16, as many vectors at a time as registers allow.
template <class S, int R>
[[gnu::always_inline]] inline void accumulate(float* c, int64_t c_row, int64_t columns,
                                              const float* factor, const uint32_t* a,
                                              int64_t a_row, int64_t a_step, const uint32_t* b,
                                              int64_t steps) {
  for (int64_t at = 0; at < columns;)
    with_count<S>((columns - at) / S::kLanes, [&](auto count) {
      accumulate_tile<S, R, count.value>(c + at, c_row, factor, a, a_row, a_step, b + at, columns,
                                         steps);
      at += count.value * S::kLanes;
    });
}

}  // namespace
}  // namespace tinyllm
