// The steps of a block that are one number in, one number out: bandwidth and nothing else. Each thread
// takes whole vectors of 16 bytes, neighbours take neighbours. FORMAT is that of activations.
#include "rows.h"

namespace tinyllm {

using Numbers = Vector<FORMAT>;
constexpr int kSize = Numbers::kSize, kThreads = 256;

// RoPE in place on queries and keys: pair (i, i + width / 2) of every head is turned by the angle of
// its position. Su et al. 2021, arXiv:2104.09864, eq. 15, half-split pairs as tinyllm/model/rope.py.
struct Rope {
  FORMAT *q, *k;            // [tokens][heads][width], [tokens][kv_heads][width]
  const float *cos, *sin;   // [table_rows][width / 2]; a token has row token % table_rows
  i64 q_stride, k_stride;   // numbers from token to token
  u32 tokens, table_rows;
  i32 heads, kv_heads, width;
  float direction;          // 1; -1 turns back, which is the gradient
};

KERNEL(rope, Rope, p, kThreads) {
  const u32 per_head = p.width / 2 / kSize, per_token = (p.heads + p.kv_heads) * per_head;
  const u32 index = blockIdx.x * kThreads + threadIdx.x, token = index / per_token;
  if (token >= p.tokens) return;
  const int head = index % per_token / per_head, first = index % per_head * kSize;
  FORMAT* const x = (head < p.heads ? p.q + token * p.q_stride + head * p.width
                                    : p.k + token * p.k_stride + (head - p.heads) * p.width) + first;
  float cos[kSize], sin[kSize];
  const i64 angles = static_cast<i64>(token % p.table_rows) * (p.width / 2) + first;
  load_floats(p.cos + angles, cos);
  load_floats(p.sin + angles, sin);
  Numbers a = load_16(x), b = load_16(x + p.width / 2);
#pragma unroll
  for (int e = 0; e < kSize; e++) {
    const float one = to_float(a.at[e]), two = to_float(b.at[e]), s = sin[e] * p.direction;
    a.at[e] = from_float<FORMAT>(one * cos[e] - two * s);
    b.at[e] = from_float<FORMAT>(two * cos[e] + one * s);
  }
  store_16(x, a);
  store_16(x + p.width / 2, b);
}

// SwiGLU: y = silu(gate) up, silu(g) = g / (1 + exp(-g)); Shazeer 2020, arXiv:2002.05202, eq. 6.
// Backward: dgate = dy up sigma (1 + g (1 - sigma)), dup = dy silu(g).
struct Swiglu {
  const FORMAT *gate, *up;  // [rows][width], stride numbers from row to row
  const FORMAT* dy;         // [rows][width], backward only
  FORMAT *y, *dgate, *dup;  // [rows][width]; y forward, the others backward
  i64 stride;
  u32 rows, width;
};

__device__ __forceinline__ float sigmoid(float x) {
  return 1.0f / (1.0f + exp_for<FORMAT>(-x));  // exp may be infinite: then 0
}

KERNEL(swiglu_forward, Swiglu, p, kThreads) {
  const u32 per_row = p.width / kSize, index = blockIdx.x * kThreads + threadIdx.x;
  const u32 row = index / per_row, first = index % per_row * kSize;
  if (row >= p.rows) return;
  const Numbers gate = load_16(p.gate + row * p.stride + first);
  const Numbers up = load_16(p.up + row * p.stride + first);
  Numbers y;
#pragma unroll
  for (int e = 0; e < kSize; e++) {
    const float g = to_float(gate.at[e]);
    y.at[e] = from_float<FORMAT>(g * sigmoid(g) * to_float(up.at[e]));
  }
  store_16(p.y + static_cast<i64>(row) * p.width + first, y);
}

KERNEL(swiglu_backward, Swiglu, p, kThreads) {
  const u32 per_row = p.width / kSize, index = blockIdx.x * kThreads + threadIdx.x;
  const u32 row = index / per_row, first = index % per_row * kSize;
  if (row >= p.rows) return;
  const i64 at = static_cast<i64>(row) * p.width + first;
  const Numbers gate = load_16(p.gate + row * p.stride + first);
  const Numbers up = load_16(p.up + row * p.stride + first), dy = load_16(p.dy + at);
  Numbers dgate, dup;
#pragma unroll
  for (int e = 0; e < kSize; e++) {
    const float g = to_float(gate.at[e]), d = to_float(dy.at[e]), s = sigmoid(g);
    dgate.at[e] = from_float<FORMAT>(d * to_float(up.at[e]) * s * (1.0f + g * (1.0f - s)));
    dup.at[e] = from_float<FORMAT>(d * g * s);
  }
  store_16(p.dgate + at, dgate);
  store_16(p.dup + at, dup);
}

}  // namespace tinyllm
