// Fused causal attention on the card: what all its kernels share.
//
//   S = scale Q K^T, masked     P = softmax(S) by rows     O = P V     lse = ln sum exp S
//
// The table of scores is never stored: Dao 2023, arXiv:2307.08691, algorithms 1 and 2. Called from
// tinyllm/ops/cuda_attention.py. B batch, T positions, H query heads, G key-value heads, K width of
// queries and keys, E width of values; query head h reads key-value head h / (H / G).
//
// A program is compiled for one number FORMAT (bf16, half), WIDTH = K, VALUE_WIDTH = E and one shape
// of the tiles: a warp owns 16 ROW_TILES rows of the result, COLUMNS rows of the other side pass by.
#pragma once
#include "device.h"

namespace tinyllm {

using Number = FORMAT;
constexpr int kWidth = WIDTH, kValueWidth = VALUE_WIDTH, kTiles = ROW_TILES, kColumns = COLUMNS;
constexpr int kRangeSize = 32;  // positions of one entry of `ranges`
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
static_assert(kWidth % 16 == 0 && kValueWidth % 16 == 0 && kColumns % kRangeSize == 0, "whole tiles");

// A tensor (B, heads, T, width): strides in elements, multiples of 8; the width without gaps.
struct Heads {
  Number* data;
  i64 batch, head, token;
};

struct Attention {
  Heads q, k, v, o;
  Heads d_o, d_q, d_k, d_v;  // gradients, backward only
  float *lse, *delta;        // [B][H][T]; lse: natural logarithm; delta: rowsum(dO O), backward only
  const i32* documents;      // [B][padded]: positions of different documents are invisible; or null
  const i32* ranges;         // [B][padded / 32][2]: least and largest document of 32 positions
  i64 padded;                // T rounded up to a multiple of 384: whole blocks of rows and columns
  i32 n_tokens, n_heads, n_kv_heads;
  i32 window;                // a query sees its own position and window - 1 before; 0: all
  float scale;               // positive
};

__device__ __forceinline__ Number* head_of(const Heads& x, int batch, int head) {
  return x.data + batch * x.batch + head * x.head;
}

// ---- sums of a warp, 16 kTiles rows: of each 8 columns lane l holds 2 (l % 4) and the next, in rows l / 4
// and, in the last two numbers, 8 more. So mma.sync leaves them, and each warp of wgmma, too.

// Calls f(i, j, e) for each number that the lane holds of kWidth columns.
template <int kWidth, class F>
__device__ __forceinline__ void for_each_sum(const F& f) {
#pragma unroll
  for (int i = 0; i < kTiles; i++)
#pragma unroll
    for (int j = 0; j < kWidth / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) f(i, j, e);
}

template <int kWidth>
__device__ __forceinline__ void clear(float (&x)[kTiles][kWidth / 8][4]) {
  for_each_sum<kWidth>([&](int i, int j, int e) { x[i][j][e] = 0; });
}

// Stores the warp's rows from `row` on, times a factor for each of the lane's rows.
template <int kWidth>
__device__ __forceinline__ void store_rows(const float (&x)[kTiles][kWidth / 8][4], const float (&factor)[kTiles][2],
                                           Number* head, i64 token, int row, int n_tokens) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int i = 0; i < kTiles; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row + 16 * i + 8 * half + lane / 4;
      if (r >= n_tokens) continue;
      Number* to = head + r * token + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kWidth / 8; j++)
        *reinterpret_cast<unsigned*>(to + 8 * j) =
            pack<Number>(x[i][j][2 * half] * factor[i][half], x[i][j][2 * half + 1] * factor[i][half]);
    }
}

// The same with one factor for all rows.
template <int kWidth>
__device__ __forceinline__ void store_rows(const float (&x)[kTiles][kWidth / 8][4], float factor, Number* head,
                                           i64 token, int row, int n_tokens) {
  float factors[kTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; i++) factors[i / 2][i % 2] = factor;
  store_rows<kWidth>(x, factors, head, token, row, n_tokens);
}

// ---- who sees whom ----

struct Visible {  // of the block's sequence; keeps no address in registers
  const Attention& p;

  __device__ __forceinline__ const i32* documents() const { return p.documents + blockIdx.z * p.padded; }

  __device__ __forceinline__ bool operator()(int query, int key) const {
    return key <= query && (p.window == 0 || query - key < p.window) &&
           (p.documents == nullptr || documents()[query] == documents()[key]);
  }

  // n positions within one entry of 32, or whole entries.
  __device__ __forceinline__ void range(int first, int n, int* low, int* high) const {
    const i32* ranges = p.ranges + (blockIdx.z * p.padded + first) / kRangeSize * 2;
    *low = ranges[0], *high = ranges[1];
    for (int i = 1; i < (n + kRangeSize - 1) / kRangeSize; i++)
      *low = min(*low, ranges[2 * i]), *high = max(*high, ranges[2 * i + 1]);
  }

  // Whether none of the queries sees any of the keys, as far as documents say.
  __device__ __forceinline__ bool apart(int query, int n_queries, int key, int n_keys) const {
    if (p.documents == nullptr) return false;
    int low, high, key_low, key_high;
    range(query, n_queries, &low, &high);
    range(key, n_keys, &key_low, &key_high);
    return low > key_high || high < key_low;
  }

  // Whether each of the queries sees each of the keys.
  __device__ __forceinline__ bool all(int query, int n_queries, int key, int n_keys) const {
    if (key + n_keys - 1 > query) return false;
    if (p.window && query + n_queries - 1 - key >= p.window) return false;
    if (p.documents == nullptr) return true;
    int low, high, key_low, key_high;
    range(query, n_queries, &low, &high);
    range(key, n_keys, &key_low, &key_high);
    return low == high && key_low == key_high && low == key_low;
  }
};

// Hides what is not visible(query, key): rows are queries and columns keys, or the other way round.
template <bool kRowsAreKeys, class Predicate>
__device__ __forceinline__ void hide(float (&s)[kTiles][kColumns / 8][4], int row, int column,
                                     const Predicate& visible) {
  const int lane = threadIdx.x % kLanes;
  for_each_sum<kColumns>([&](int i, int j, int e) {
    const int r = row + 16 * i + lane / 4 + e / 2 * 8, c = column + 8 * j + lane % 4 * 2 + e % 2;
    if (!(kRowsAreKeys ? visible(c, r) : visible(r, c))) s[i][j][e] = -kInfinity;
  });
}

}  // namespace tinyllm
