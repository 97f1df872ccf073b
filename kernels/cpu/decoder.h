// Tokens through a whole transformer with INT8 weights in one call, called from tinyllm/ops/decoder.py.
//
//   x = E[id]      per layer:  q, k, v = W_qkv norm(x);  q, k = rope(norm(q)), rope(norm(k)); k, v to the cache
//                              x += W_o attention(q, K, V);  x += W_down R(silu(g) * u), (g, u) = W_gu norm(x)
//   logits = W_head norm(x)
//
// Norms: Zhang & Sennrich 2019, arXiv:1910.07467; rope: Su et al. 2021, arXiv:2104.09864, half-split pairs; shared
// keys: Ainslie et al. 2023, arXiv:2305.13245; silu(g) u: Shazeer 2020, arXiv:2002.05202.
// R rotates each 32 neighbours by their Hadamard matrix; W_down is stored as W R^T, so nothing changes but
// that no single large number decides the scale of the row (Ashkboos et al. 2024, arXiv:2404.00456, section 4.1).
// An input of a matrix is a sum of `terms` INT8 rows with a scale each: the second is what rounding the first left
// over, so two have about 16 bits. Both go through the weight while it is at hand.
// A row is one token of one sequence. Every number of a row has one order of computing, whatever the
// other rows, the threads and the instruction set: a prompt at once, in parts or token by token,
// alone or in a batch, gives the same bits.
// Dimensions: D width, F feed-forward width, H query heads, G key-value heads, K head width.
#pragma once
#include "w8a8.h"

namespace tinyllm {

struct Layer {
  const Weight *qkv, *o, *down;            // (H + 2 G) K from D; D from H K; D from F
  const Weight* gate_up;                   // 2 F from D: 32 gates, their 32 ups, the next 32 gates ...
  const float *norm_attention, *norm_mlp;  // [D]
  const float *norm_q, *norm_k;            // [K], null where queries and keys are not normalised
  int64_t window;                          // keys that a query sees, its own among them; 0: all
};

struct Decoder {
  const Layer* layers;
  const Weight* head;                // V from D
  const int8_t* embedding;           // [V][D], row-major
  const float* embedding_scale;      // [V]
  const float* norm;                 // [D], before the head
  const float *cosines, *sines;      // [positions][K / 2]
  int64_t n_layers, d, d_ff, n_heads, n_kv_heads, d_head;
  int64_t terms;                     // 1 or 2
  float eps;
};

// `n_tokens` new tokens for each of `n_sequences` sequences.
struct Tokens {
  const int64_t* ids;                // [sequences][tokens]
  const int64_t* starts;             // [sequences]: how many positions are cached before
  void *keys, *values;               // the cache; strides in numbers, K numbers lie together
  float *key_scale, *value_scale;    // of INT8, else null; strides are those of the numbers / position_stride
  int64_t layer_stride, sequence_stride, head_stride, position_stride;
  Stored stored;                     // what the cache holds
  float* hidden;                     // [sequences][tokens][D], normalised; or null
  float* logits;                     // [sequences][V] after the last token; or null
  int64_t n_sequences, n_tokens;
};

}  // namespace tinyllm

extern "C" {
// Return 0, -1 where an argument is impossible, -2 without memory.
int tinyllm_decode(const tinyllm::Decoder* decoder, const tinyllm::Tokens* tokens, int64_t threads);
}
