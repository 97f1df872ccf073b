// Symmetric INT8 with one scale per row, and back; FORMAT is that of the numbers.
//
//   scale = max|x| / 127    q = round(x (127 / max|x|)), halves to even, in [-127, 127]
//
// A row is a token's activations, or an output's weights (per-channel scales). Bit for bit what
// tinyllm/ops/reference.py computes, so NaN, infinity and rows that are almost zero are as there.
#include "rows.h"

namespace tinyllm {

using Numbers = Vector<FORMAT>;
constexpr int kSize = Numbers::kSize;
constexpr float kTinyAbsmax = 0x1p-100f;  // a smaller row counts as zero: 127 / absmax would overflow

struct QuantizeRows {
  const FORMAT* x;  // [rows][width]
  i8* q;            // [rows][stride], zeros behind the width
  float* scale;     // [rows]
  i64 rows;
  i32 width, stride;
};

KERNEL(quantize_rows, QuantizeRows, p, 1024) {
  SHARED(u32, shared);
  const i64 row = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;  // as in rms_norm.cu
  Numbers held[kHeld];
  u32 most = 0;  // as bits, because a maximum of floats would pass over NaN
  for_each_held<FORMAT>(p.width, [&](int i, int at) {
    held[i] = load_16(p.x + row * p.width + at);
#pragma unroll
    for (int e = 0; e < kSize; e++) most = max(most, magnitude(to_float(held[i].at[e])));
  });
  const float absmax = __uint_as_float(row_max(most, shared));
  const bool finite = absmax < kInfinity, usable = finite && absmax >= kTinyAbsmax;
  const float inverse = usable ? __fdiv_rn(127.0f, absmax) : 0.0f;
  if (threadIdx.x == 0)
    p.scale[row] = usable ? __fdiv_rn(absmax, 127.0f) : finite ? 0.0f : __uint_as_float(0x7fffffffu);
  for_each_held<FORMAT>(p.stride, [&](int i, int at) {
    Bytes<kSize> q = {};
    if (at < p.width && usable) {
#pragma unroll
      for (int e = 0; e < kSize; e++) {
        const int rounded = __float2int_rn(__fmul_rn(to_float(held[i].at[e]), inverse));
        q.at[e] = static_cast<i8>(max(-127, min(127, rounded)));
      }
    }
    store_bytes(p.q + row * p.stride + at, q);
  });
}

struct DequantizeRows {
  const i8* q;         // [rows][width]
  const float* scale;  // [rows]
  FORMAT* x;           // [rows][width], q scale
  i64 rows;
  i32 width;           // a multiple of 16
};

KERNEL(dequantize_rows, DequantizeRows, p, 256) {
  const i64 first = (static_cast<i64>(blockIdx.x) * 256 + threadIdx.x) * 16;
  if (first >= p.rows * p.width) return;
  const Vector<i8> q = load_16(p.q + first);
  const float scale = p.scale[first / p.width];
#pragma unroll
  for (int i = 0; i < 16; i += kSize) {
    Numbers x;
#pragma unroll
    for (int e = 0; e < kSize; e++)
      x.at[e] = from_float<FORMAT>(__fmul_rn(static_cast<float>(q.at[i + e]), scale));
    store_16(p.x + first + i, x);
  }
}

}  // namespace tinyllm
