// The softmax of rows whose columns come block after block, kept relative to the largest score so far.
//
// When a larger one comes, what was summed is rescaled (Milakov & Gimelshein 2018, arXiv:1805.02867).
#pragma once
#include "attention.h"

namespace tinyllm {

struct Softmax {
  float largest[kTiles][2];  // score of a row so far
  float sum[kTiles][2];      // of exp(score - largest), this lane's columns

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; i++) largest[i / 2][i % 2] = -kInfinity, sum[i / 2][i % 2] = 0;
  }

  // Turns scores into weights, exp(score - largest); by `shrink` goes what was summed before.
  __device__ __forceinline__ void update(float (&s)[kTiles][kColumns / 8][4], float (&shrink)[kTiles][2],
                                         float scale) {
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
        shrink[i][half] = exp2_fast(largest[i][half] * scale - base);
        largest[i][half] = best;
        sum[i][half] *= shrink[i][half];
#pragma unroll
        for (int j = 0; j < kColumns / 8; j++)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++) {
            s[i][j][e] = exp2_fast(fmaf(s[i][j][e], scale, -base));
            sum[i][half] += s[i][j][e];
          }
      }
  }

  // After the last block: the factor of each row of the result; stores the log-sum-exp of a head's rows.
  __device__ __forceinline__ void finish(float (&factor)[kTiles][2], float* lse, int row, int n_tokens, float scale) {
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int i = 0; i < kTiles; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        sum[i][half] += __shfl_xor_sync(kAllLanes, sum[i][half], 1);
        sum[i][half] += __shfl_xor_sync(kAllLanes, sum[i][half], 2);
        factor[i][half] = 1.0f / sum[i][half];
        const int r = row + 16 * i + 8 * half + lane / 4;
        if (lane % 4 == 0 && r < n_tokens) lse[r] = largest[i][half] * scale + log2_fast(sum[i][half]) * kLn2;
      }
  }
};

// Each row of the result times its `shrink`.
__device__ __forceinline__ void rescale(float (&o)[kTiles][kValueWidth / 8][4], const float (&shrink)[kTiles][2]) {
  for_each_sum<kValueWidth>([&](int i, int j, int e) { o[i][j][e] *= shrink[i][e / 2]; });
}

}  // namespace tinyllm
