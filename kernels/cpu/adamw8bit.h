// One AdamW step with 8-bit states, called from tinyllm/ops/adamw8bit.py.
//
//   m = beta1 m + (1 - beta1) g     v = beta2 v + (1 - beta2) g^2
//   p = p decay - rate (m / (sqrt(v) inverse2 + eps))
//
// m and v are kept as bytes, in blocks of 256 with one scale, the largest magnitude: a byte is the
// number of the nearest of 256 codes to the value over the scale (Dettmers et al. 2021,
// arXiv:2110.02861). Every product and sum is rounded by itself, so all instruction sets and
// tinyllm/ops/reference.py give the same bits.
#pragma once
#include <cstdint>

namespace tinyllm {

constexpr int64_t kStateBlock = 256;
constexpr float kTinyScale = 0x1p-120f;  // a block that is smaller counts as zero: 1 / scale is finite

// How the nearest code is found without a search. Within a decade the codes are equally far apart,
// and each decade's are farther apart than those below it: so the number of codes below x is the
// least of seven straight lines. Moved down by a half, it names the nearest code or the one before
// it, whatever the rounding, and one comparison with the middle between the two decides.
constexpr int kDecades = 7;

struct StateCode {
  const float* value;   // [256] rising
  const float* middle;  // [256] between a code and the next; the last is infinite
  float slope[kDecades], offset[kDecades];  // of the lines, for magnitudes
  int32_t zero;         // the number of the code 0
};

struct AdamW8bit {
  float* p;
  const float* g;
  uint8_t *m, *v;
  float *m_scale, *v_scale;  // [ceil(n / 256)]
  int64_t n;
  StateCode signed_code, unsigned_code;  // of m, of v
  float beta1, rest1, beta2, rest2;      // rest = 1 - beta
  float rate, inverse2, eps, decay;
};

// Blocks [first, last) of a problem.
void adamw8bit_portable(const AdamW8bit& problem, int64_t first, int64_t last);
void adamw8bit_avx512(const AdamW8bit& problem, int64_t first, int64_t last);

}  // namespace tinyllm

// Returns 0, or -1 where an argument is impossible. `isa` as in w8a8.h.
extern "C" int tinyllm_adamw8bit(const tinyllm::AdamW8bit* problem, int64_t isa, int64_t threads);
