// One AdamW step with 8-bit states: kernels/cpu/adamw8bit.h on a card, equal to it in every bit.
//
//   m = beta1 m + (1 - beta1) g     v = beta2 v + (1 - beta2) g^2
//   p = p decay - rate (m / (sqrt(v) inverse2 + eps))
//
// A warp takes a block of 256 numbers, which have one scale: a lane four neighbours of each half, so
// p and g move by 16 bytes and codes by 4, without gaps. Every operation is rounded by itself
// (__fmul_rn: no multiplication is merged with an addition). The tables lie in shared memory.
#include "rows.h"

namespace tinyllm {

constexpr int kWarps = 8, kStateBlock = 256, kQuads = 2;
constexpr float kTinyScale = 0x1p-120f;  // a smaller block counts as zero: 1 / scale is finite
constexpr int kDecades = 7;

struct Tables {
  float value[2][256];   // of signed codes (m), of unsigned ones (v)
  float middle[2][256];  // between a code and the next; the last is infinite
};

// The least of seven lines names the nearest code or the one before it: kernels/cpu/adamw8bit.h.
struct Lines {
  float slope[kDecades], offset[kDecades];
  i32 zero;  // the number of the code 0
};

struct AdamW8bit {
  float* p;
  const float* g;
  u8 *m, *v;
  float *m_scale, *v_scale;  // [ceil(n / 256)]
  const Tables* tables;
  i64 n;
  Lines lines[2];            // of signed and of unsigned codes
  float beta1, rest1, beta2, rest2, rate, inverse2, eps, decay;  // rest = 1 - beta
};

__device__ __forceinline__ int nearest(const Tables& t, const Lines& lines, int kind, float x) {
  float below = fabsf(x) * lines.slope[0] + lines.offset[0];
#pragma unroll
  for (int d = 1; d < kDecades; d++)
    below = fminf(below, fabsf(x) * lines.slope[d] + lines.offset[d]);
  const int count = static_cast<int>(fmaxf(below, 0.0f));  // fmaxf: and where it is not a number
  const int first = max(0, x < 0 ? lines.zero - 1 - count : lines.zero + count);
  return first + (x > t.middle[kind][first] ? 1 : 0);
}

// Four codes in a word, of the numbers at `at`.
__device__ __forceinline__ u32 load_codes(const u8* codes, i64 at, i64 n) {
  if (at + 4 <= n) return *reinterpret_cast<const u32*>(codes + at);
  u32 word = 0;
  for (int e = 0; e < 4; e++)
    if (at + e < n) word |= static_cast<u32>(codes[at + e]) << 8 * e;
  return word;
}
__device__ __forceinline__ Vector<float> load_quad(const float* x, i64 at, i64 n) {
  if (at + 4 <= n) return load_16(x + at);
  Vector<float> v;
  for (int e = 0; e < 4; e++) v.at[e] = at + e < n ? x[at + e] : 0.0f;
  return v;
}

// Stores numbers as codes with a new scale; all lanes of the warp.
__device__ __forceinline__ void quantize(const Tables& t, const Lines& lines, int kind,
                                         const float (&x)[kQuads][4], i64 first, i64 n, u8* codes,
                                         float* scale) {
  u32 most = 0;
#pragma unroll
  for (int j = 0; j < kQuads; j++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (first + j * 128 + e < n) most = max(most, magnitude(x[j][e]));
  const float largest = __uint_as_float(warp_max(most));
  const bool usable = largest >= kTinyScale;
  const float inverse = usable ? __fdiv_rn(1.0f, largest) : 0.0f;
  if (threadIdx.x % kLanes == 0) *scale = usable ? largest : 0.0f;
#pragma unroll
  for (int j = 0; j < kQuads; j++) {
    const i64 at = first + j * 128;
    u32 word = 0;
#pragma unroll
    for (int e = 0; e < 4; e++)
      word |= static_cast<u32>(nearest(t, lines, kind, __fmul_rn(x[j][e], inverse))) << 8 * e;
    if (at + 4 <= n) {
      *reinterpret_cast<u32*>(codes + at) = word;
    } else {
      for (int e = 0; e < 4; e++)
        if (at + e < n) codes[at + e] = static_cast<u8>(word >> 8 * e);
    }
  }
}

// One block of numbers; `first` is the lane's first one.
__device__ __forceinline__ void step(const AdamW8bit& s, const Tables& t, i64 block, i64 first) {
  const float m_scale = s.m_scale[block], v_scale = s.v_scale[block];
  float m[kQuads][4], v[kQuads][4];
#pragma unroll
  for (int j = 0; j < kQuads; j++) {
    const i64 at = first + j * 128;
    const Vector<float> g = load_quad(s.g, at, s.n);
    Vector<float> p = load_quad(s.p, at, s.n);
    const u32 m_codes = load_codes(s.m, at, s.n), v_codes = load_codes(s.v, at, s.n);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float old_m = __fmul_rn(t.value[0][m_codes >> 8 * e & 255], m_scale);
      const float old_v = __fmul_rn(t.value[1][v_codes >> 8 * e & 255], v_scale);
      m[j][e] = __fadd_rn(__fmul_rn(old_m, s.beta1), __fmul_rn(g.at[e], s.rest1));
      v[j][e] = __fadd_rn(__fmul_rn(old_v, s.beta2), __fmul_rn(__fmul_rn(g.at[e], g.at[e]), s.rest2));
      const float root = __fadd_rn(__fmul_rn(__fsqrt_rn(v[j][e]), s.inverse2), s.eps);
      const float update = __fdiv_rn(m[j][e], root);
      p.at[e] = __fadd_rn(__fmul_rn(p.at[e], s.decay), -__fmul_rn(update, s.rate));
    }
    if (at + 4 <= s.n) {
      store_16(s.p + at, p);
    } else {
      for (int e = 0; e < 4; e++)
        if (at + e < s.n) s.p[at + e] = p.at[e];
    }
  }
  quantize(t, s.lines[0], 0, m, first, s.n, s.m, s.m_scale + block);
  quantize(t, s.lines[1], 1, v, first, s.n, s.v, s.v_scale + block);
}

KERNEL(adamw8bit, AdamW8bit, p, kWarps * kLanes) {
  SHARED(u8, shared);
  for (int i = threadIdx.x * 16; i < static_cast<int>(sizeof(Tables)); i += kWarps * kLanes * 16)
    store_16(shared + i, load_16(reinterpret_cast<const u8*>(p.tables) + i));
  __syncthreads();
  const Tables& tables = *reinterpret_cast<const Tables*>(shared);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const i64 blocks = (p.n + kStateBlock - 1) / kStateBlock;
  for (i64 block = static_cast<i64>(blockIdx.x) * kWarps + warp; block < blocks;
       block += static_cast<i64>(gridDim.x) * kWarps)
    step(p, tables, block, block * kStateBlock + lane * 4);
}

}  // namespace tinyllm
