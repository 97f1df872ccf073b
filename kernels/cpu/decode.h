// One token through one block of the transformer, in two calls: up to the keys and values that go
// into the cache, and from the cache to the block's output. Called from tinyllm/ops/decode.py.
//
//   qkv = rope(norm(W_qkv norm(x)))          y = x' + W_down(silu(g) * u),  (g, u) = W_gate_up norm(x')
//                                            x' = x + W_o attention(q, K, V)
//
// Dimensions: D width, F feed-forward width, H query heads, G key-value heads, K head width, S keys.
// Linear layers are those of w8a8.h, bit for bit; the rest is fp32 as in tinyllm/model, summed in
// another order.
#pragma once
#include "w8a8.h"

namespace tinyllm {

struct Block {
  const Weight *qkv, *o, *gate_up, *down;  // (H + 2 G) K from D; D from H K; 2 F from D; D from F
  const float *norm_attention, *norm_mlp;  // [D]
  const float *norm_q, *norm_k;            // [K], null where queries and keys are not normalised
  int64_t d, d_ff, n_heads, n_kv_heads, d_head;
  float eps;
};

}  // namespace tinyllm

extern "C" {
// x [D], cosines and sines [K / 2] -> qkv [(H + 2 G) K]: queries, keys, values, head by head.
int tinyllm_decode_project(const tinyllm::Block* block, const float* x, const float* cosines,
                           const float* sines, float* qkv, int64_t threads);

// x [D], qkv as above, keys and values of S positions (strides in floats) -> y [D].
int tinyllm_decode_finish(const tinyllm::Block* block, const float* x, const float* qkv,
                          const float* keys, int64_t key_head_stride, int64_t key_stride,
                          const float* values, int64_t value_head_stride, int64_t value_stride,
                          int64_t n_keys, float* y, int64_t threads);
}
