// Causal attention on the CPU, forward and backward, called from tinyllm/ops/flash.py.
//
//   S = scale Q K^T, masked     P = softmax(S) by rows     O = P V     lse = ln sum exp S
//
// The table of scores is never stored: Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
// Dimensions: B batch, T positions, H query heads, G key-value heads, K width of queries and keys,
// E width of values. Query head h reads key-value head h / (H / G).
#pragma once
#include <cstdint>

namespace tinyllm {

constexpr int64_t kMaxWidth = 128;   // K and E are multiples of 16 up to this
constexpr int64_t kRows = 6;         // query rows of one register tile; even: bf16 goes in pairs
constexpr int64_t kBlockKeys = 64;   // keys of one block

// A tensor (B, heads, T, width): strides in elements, the width without gaps.
struct Heads {
  void* data;
  int64_t batch, head, token;
};

struct Attention {
  Heads q, k, v, o;               // bf16 or fp32, all alike
  Heads d_o, d_q, d_k, d_v;       // gradients, backward only
  float* lse;                     // [B][H][T], natural logarithm
  const int32_t* documents;       // [B][T]: positions of different documents are invisible; or null
  int64_t n_batch, n_tokens, n_heads, n_kv_heads, width, value_width;
  int64_t window;                 // a query sees its own position and window - 1 before; 0: all
  float scale;                    // positive
  int64_t is_bf16;
  int64_t isa;                    // index in the table of instruction sets, see w8a8.h
};

// One instruction set and number format. A task is one key-value head of one sequence with all
// query heads that read it, so no two tasks write to the same place and sums have one order.
struct FlashIsa {
  int64_t (*scratch_bytes)(const Attention& problem, bool backward);
  void (*forward)(const Attention& problem, int64_t task, void* scratch);
  void (*backward)(const Attention& problem, int64_t task, void* scratch);
};

// Defined in one translation unit each; see w8a8.h for what such a unit may contain.
extern const FlashIsa kFlashAvx2[2];    // fp32 arithmetic; [0] fp32 tensors, [1] bf16 tensors
extern const FlashIsa kFlashAvx512[2];  // likewise
extern const FlashIsa kFlashBf16;       // bf16 products with fp32 sums, bf16 tensors

}  // namespace tinyllm

// Return 0, -1 where an argument is impossible, -2 without memory.
extern "C" {
int tinyllm_flash_forward(const tinyllm::Attention* problem, int64_t threads);
int tinyllm_flash_backward(const tinyllm::Attention* problem, int64_t threads);
}
