// Tiles in shared memory and products by mma.sync, for every card: what the three kernels share.
#pragma once
#include "attention.h"

namespace tinyllm {

constexpr int kThreads = 128, kWarpRows = 16 * kTiles, kRows = kThreads / kLanes * kWarpRows;
static_assert(kRows % kColumns == 0, "a block of rows begins where a block of columns begins");

// ---- tiles: rows of 16-bit numbers in shared memory, in chunks of 8 numbers (16 bytes) ----
//
// ldmatrix reads a column of 8 chunks at once, which must lie in 8 different groups of 4 banks. The
// chunk's index is XORed with bits of the row, as many as keep it within the row.

template <int kWidth>
__device__ __forceinline__ int place(int row, int chunk) {  // in numbers
  constexpr int kChunks = kWidth / 8, kBits = kChunks % 8 == 0 ? 3 : kChunks % 4 == 0 ? 2 : 1;
  return (row * kChunks + (chunk ^ (row >> (3 - kBits) & ((1 << kBits) - 1)))) * 8;
}

// Starts copying kRows rows from `row` on of a head into a tile; rows past the end are zeros.
template <int kWidth, int kRows>
__device__ __forceinline__ void stage(Number* tile, const Number* head, i64 token, int row, int n_tokens) {
  constexpr int kChunks = kWidth / 8;
#pragma unroll 1  // more costs registers
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, c = i % kChunks;
    const bool is_real = row + r < n_tokens;
    cp_async_16(tile + place<kWidth>(r, c), head + (is_real ? row + r : 0) * token + c * 8, is_real);
  }
}

// sums += A B^T: rows `row` ... of tile A, the rows of tile B; kDepth numbers each.
template <int kDepth, int kColumns>
__device__ __forceinline__ void multiply_rows(float (&sums)[kTiles][kColumns / 8][4], const Number* a, int row,
                                              const Number* b) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int depth = 0; depth < kDepth / 8; depth += 2) {  // in chunks
    unsigned left[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; i++)
      ldmatrix_x4(left[i], a + (row + 16 * i) * kDepth + place<kDepth>(lane % 16, depth ^ lane / 16));
#pragma unroll
    for (int j = 0; j < kColumns / 16; j++) {
      unsigned both[4];
      ldmatrix_x4(both, b + (16 * j + lane / 16 * 8) * kDepth + place<kDepth>(lane % 8, depth ^ lane / 8 % 2));
      const unsigned right[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
#pragma unroll
      for (int i = 0; i < kTiles; i++) {
        mma_m16n8k16<Number>(sums[i][2 * j], left[i], right[0]);
        mma_m16n8k16<Number>(sums[i][2 * j + 1], left[i], right[1]);
      }
    }
  }
}

// sums += W B: weights of an earlier product, still in registers, times the kDepth rows of tile B.
template <int kDepth, int kWidth>
__device__ __forceinline__ void multiply_weights(float (&sums)[kTiles][kWidth / 8][4],
                                                 const float (&w)[kTiles][kDepth / 8][4], const Number* b) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int depth = 0; depth < kDepth / 16; depth++) {
    unsigned left[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; i++)  // a lane's sums are just what it must hold of the left operand
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float* pair = w[i][2 * depth + e / 2] + e % 2 * 2;
        left[i][e] = pack<Number>(pair[0], pair[1]);
      }
#pragma unroll
    for (int j = 0; j < kWidth / 16; j++) {
      unsigned both[4];
      ldmatrix_x4_trans(both, b + 16 * depth * kWidth + place<kWidth>(lane % 16, 2 * j ^ lane / 16));
      const unsigned right[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
#pragma unroll
      for (int i = 0; i < kTiles; i++) {
        mma_m16n8k16<Number>(sums[i][2 * j], left[i], right[0]);
        mma_m16n8k16<Number>(sums[i][2 * j + 1], left[i], right[1]);
      }
    }
  }
}

// ---- the keys and values that pass by a block of kRows queries, kColumns after kColumns ----

struct KeyBlocks {
  const Attention& p;
  const Number *k, *v;
  Number* tiles;   // two halves of shared memory: one is read while the other one fills
  int first, end;  // the first query; one past the last key that any of them sees

  __device__ __forceinline__ KeyBlocks(const Attention& p, int group, int first, Number* tiles)
      : p(p),
        k(head_of(p.k, blockIdx.z, group)),
        v(head_of(p.v, blockIdx.z, group)),
        tiles(tiles),
        first(first),
        end(min(first + kRows, p.n_tokens)) {}

  // The first block from `key` on that some query may see; not below `end`: there is none.
  __device__ __forceinline__ int next(int key) const {
    while (key < end && Visible{p}.apart(first, kRows, key, kColumns)) key += kColumns;
    return key;
  }
  __device__ __forceinline__ int begin() const {
    return next(p.window ? max(first - p.window + 1, 0) / kColumns * kColumns : 0);
  }
  // The keys of a half; its values follow.
  __device__ __forceinline__ Number* tile(int half) const {
    return tiles + half * kColumns * (kWidth + kValueWidth);
  }
  __device__ __forceinline__ void fetch(int key, int half) const {
    stage<kWidth, kColumns>(tile(half), k, p.k.token, key, p.n_tokens);
    stage<kValueWidth, kColumns>(tile(half) + kColumns * kWidth, v, p.v.token, key, p.n_tokens);
  }
};

}  // namespace tinyllm
