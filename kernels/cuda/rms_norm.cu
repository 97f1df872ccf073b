// RMSNorm with the residual addition before it, forward and backward; FORMAT is that of activations.
//
//   s = x + residual (rounded to FORMAT)      y = w s r,  r = 1 / sqrt(mean(s^2) + eps)
//
// Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4. Everything inside is fp32, so fp16 cannot overflow.
// Backward, with h = s r: ds = r (w dy - h mean(w dy h)) + the gradient that reaches s otherwise,
// and dw = sum over rows of dy h: first per slot (a team of threads that takes every n-th row), then
// over slots, both in a fixed order.
#include "rows.h"

namespace tinyllm {

using Row = Vector<FORMAT>;
constexpr int kSize = Row::kSize;

struct RmsNormForward {
  const FORMAT *x, *residual;  // [rows][width]; residual may be null
  const float* weight;         // [width]
  FORMAT *sum, *y;             // [rows][width]; sum is written if there is a residual
  float* inverse;              // [rows], r
  i64 rows;
  i32 width;
  float eps;
};

KERNEL(rms_norm_forward, RmsNormForward, p, 256) {
  SHARED(float, shared);
  const i64 row = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;  // a whole warp, and then a row is one warp: nobody waits for it
  Row held[kHeld];
  float squares = 0;
  for_each_held<FORMAT>(p.width, [&](int i, int at) {
    held[i] = load_16(p.x + row * p.width + at);
    if (p.residual) {
      const Row other = load_16(p.residual + row * p.width + at);
#pragma unroll
      for (int e = 0; e < kSize; e++)
        held[i].at[e] = from_float<FORMAT>(to_float(held[i].at[e]) + to_float(other.at[e]));
      store_16(p.sum + row * p.width + at, held[i]);
    }
#pragma unroll
    for (int e = 0; e < kSize; e++) squares += to_float(held[i].at[e]) * to_float(held[i].at[e]);
  });
  const float mean = row_sum(squares, shared) / static_cast<float>(p.width);
  const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(mean + p.eps));
  if (threadIdx.x == 0) p.inverse[row] = inverse;
  for_each_held<FORMAT>(p.width, [&](int i, int at) {
    float weight[kSize];
    load_floats(p.weight + at, weight);
    Row y;
#pragma unroll
    for (int e = 0; e < kSize; e++)
      y.at[e] = from_float<FORMAT>(to_float(held[i].at[e]) * inverse * weight[e]);
    store_16(p.y + row * p.width + at, y);
  });
}

struct RmsNormBackward {
  const FORMAT *dy, *sum;        // [rows][width]; sum: what was normalised
  const FORMAT* dsum;            // [rows][width], or null
  const float *weight, *inverse;
  FORMAT* dx;                    // [rows][width], of x and of the residual alike
  float* partial;                // [slots][width], slots = gridDim.x blockDim.y
  i64 rows;
  i32 width;
};

KERNEL(rms_norm_backward, RmsNormBackward, p, 256) {
  SHARED(float, shared);
  const i64 slots = static_cast<i64>(gridDim.x) * blockDim.y;
  const i64 slot = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
  float dweight[kHeld][kSize] = {};
  for (i64 row = slot; row < p.rows; row += slots) {  // the same rows for all threads of a team
    const float inverse = p.inverse[row];
    Row s[kHeld], dy[kHeld];
    float product = 0;
    for_each_held<FORMAT>(p.width, [&](int i, int at) {
      s[i] = load_16(p.sum + row * p.width + at);
      dy[i] = load_16(p.dy + row * p.width + at);
      float weight[kSize];
      load_floats(p.weight + at, weight);
#pragma unroll
      for (int e = 0; e < kSize; e++) {
        const float part = to_float(dy[i].at[e]) * (to_float(s[i].at[e]) * inverse);
        dweight[i][e] += part;
        product += part * weight[e];
      }
    });
    const float mean = row_sum(product, shared) / static_cast<float>(p.width);
    for_each_held<FORMAT>(p.width, [&](int i, int at) {
      float weight[kSize];
      load_floats(p.weight + at, weight);
      Row other, dx;
      if (p.dsum) other = load_16(p.dsum + row * p.width + at);
#pragma unroll
      for (int e = 0; e < kSize; e++) {
        const float normed = to_float(s[i].at[e]) * inverse;
        const float d = inverse * (to_float(dy[i].at[e]) * weight[e] - normed * mean);
        dx.at[e] = from_float<FORMAT>(p.dsum ? d + to_float(other.at[e]) : d);
      }
      store_16(p.dx + row * p.width + at, dx);
    });
  }
  for_each_held<FORMAT>(p.width, [&](int i, int at) { store_floats(p.partial + slot * p.width + at, dweight[i]); });
}

struct RmsNormWeight {
  const float* partial;  // [slots][width]
  float* dweight;        // [width]
  i32 slots, width;
};

constexpr int kQuads = 8, kGroups = 32;  // a block: 8 x 4 columns, every 32nd slot

KERNEL(rms_norm_weight, RmsNormWeight, p, kQuads * kGroups) {
  SHARED(float, shared);  // [kGroups][4 kQuads]
  const int quad = threadIdx.x % kQuads, group = threadIdx.x / kQuads;
  const int column = (blockIdx.x * kQuads + quad) * 4;
  float sums[4] = {};
  if (column < p.width)
    for (int slot = group; slot < p.slots; slot += kGroups) {
      float part[4];
      load_floats(p.partial + static_cast<i64>(slot) * p.width + column, part);
#pragma unroll
      for (int e = 0; e < 4; e++) sums[e] += part[e];
    }
  store_floats(shared + threadIdx.x * 4, sums);
  __syncthreads();
  const int mine = blockIdx.x * kQuads * 4 + threadIdx.x;
  if (threadIdx.x >= kQuads * 4 || mine >= p.width) return;
  float sum = 0;
  for (int i = 0; i < kGroups; i++) sum += shared[i * kQuads * 4 + threadIdx.x];
  p.dweight[mine] = sum;
}

}  // namespace tinyllm
