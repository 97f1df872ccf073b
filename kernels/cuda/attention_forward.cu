// O and the log-sum-exp of a block of queries: keys and values pass by, block after block.
//
// The sum is kept relative to the largest score so far; when a larger one comes, what was summed is
// rescaled (Milakov & Gimelshein 2018, arXiv:1805.02867). While one block is worked on, the next one is
// on its way into the other half of the shared memory.
#include "attention.h"

namespace tinyllm {
namespace {

struct Softmax {
  float largest[kTiles][2];  // score of a row so far
  float sum[kTiles][2];      // of exp(score - largest), this lane's columns

  // Turns scores into weights, exp(score - largest), and rescales what was summed before.
  __device__ __forceinline__ void update(float (&s)[kTiles][kColumns / 8][4],
                                         float (&o)[kTiles][kValueWidth / 8][4], float scale) {
#pragma unroll
    for (int i = 0; i < kTiles; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float best = largest[i][half];
#pragma unroll
        for (int j = 0; j < kColumns / 8; j++)
          best = fmaxf(best, fmaxf(s[i][j][2 * half], s[i][j][2 * half + 1]));
        best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, 1));  // the four lanes of a row
        best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, 2));
        const float base = best == -kInfinity ? 0.0f : best * scale;  // nothing visible yet
        const float shrink = exp2_fast(largest[i][half] * scale - base);
        largest[i][half] = best;
        sum[i][half] *= shrink;
#pragma unroll
        for (int j = 0; j < kColumns / 8; j++)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++) {
            s[i][j][e] = exp2_fast(fmaf(s[i][j][e], scale, -base));
            sum[i][half] += s[i][j][e];
          }
#pragma unroll
        for (int j = 0; j < kValueWidth / 8; j++)
          o[i][j][2 * half] *= shrink, o[i][j][2 * half + 1] *= shrink;
      }
  }
};

}  // namespace

KERNEL(attention_forward, Attention, p, kThreads) {
  SHARED(Number, shared);
  Number* const q_tile = shared;
  const int head = blockIdx.y, group = head / (p.n_heads / p.n_kv_heads), batch = blockIdx.z;
  const int first = (gridDim.x - 1 - blockIdx.x) * kRows;  // the longest rows begin first
  const int warp_row = threadIdx.x / kLanes * kWarpRows, row = first + warp_row;
  const Visible visible{p};
  const KeyBlocks blocks(p, group, first, shared + kRows * kWidth);

  Softmax softmax;
  float o[kTiles][kValueWidth / 8][4], factor[kTiles][2];
  clear<kValueWidth>(o);
#pragma unroll
  for (int i = 0; i < 2 * kTiles; i++) softmax.largest[i / 2][i % 2] = -kInfinity, softmax.sum[i / 2][i % 2] = 0;

  stage<kWidth, kRows>(q_tile, head_of(p.q, batch, head), p.q.token, first, p.n_tokens);
  int key = blocks.begin();
  blocks.fetch(key, 0);
  cp_async_commit();
  for (int half = 0; key < blocks.end; half ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // everyone's copies have arrived, and no one reads the other half any more
    const int next = blocks.next(key + kColumns);
    if (next < blocks.end) blocks.fetch(next, half ^ 1);
    cp_async_commit();
    if (key < row + kWarpRows) {  // not after the warp's last query
      const Number* tile = blocks.tile(half);
      float s[kTiles][kColumns / 8][4];
      clear<kColumns>(s);
      multiply_rows<kWidth, kColumns>(s, q_tile, warp_row, tile);
      if (!visible.all(row, kWarpRows, key, kColumns)) hide<false>(s, row, key, visible);
      softmax.update(s, o, p.scale * kLog2E);
      multiply_weights<kColumns, kValueWidth>(o, s, tile + kColumns * kWidth);
    }
    key = next;
  }

  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int i = 0; i < kTiles; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = softmax.sum[i][half];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      factor[i][half] = 1.0f / sum;
      const int r = row + 16 * i + 8 * half + lane / 4;
      if (lane % 4 == 0 && r < p.n_tokens)
        p.lse[(static_cast<i64>(batch) * p.n_heads + head) * p.n_tokens + r] =
            softmax.largest[i][half] * p.scale + log2_fast(sum) * kLn2;
    }
  store_rows<kValueWidth>(o, factor, head_of(p.o, batch, head), p.o.token, row, p.n_tokens);
}

}  // namespace tinyllm
