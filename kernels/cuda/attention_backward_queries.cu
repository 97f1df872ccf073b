// dQ of a block of queries, and delta: keys and values pass by.
//
//   P = exp(S - lse)   dS = P (dO V^T - delta)   delta = rowsum(dO O)   dQ = scale dS K
//
// (Dao 2023, arXiv:2307.08691, algorithm 2.) dK and dV are attention_backward_keys', which runs after
// this and reads delta. Each kernel owns the rows that it writes, so there are no atomics and every sum
// has one order: the same bits in every run. The price is that S and dO V^T are computed twice.
#include "attention_mma.h"

namespace tinyllm {
namespace {

// rowsum(dO O) of the lane's rows: the four lanes of a row share its chunks.
__device__ __forceinline__ void row_sums(float (&delta)[kTiles][2], const Number* d_o_tile, int warp_row,
                                         const Number* o, i64 token, int row, int n_tokens) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int i = 0; i < kTiles; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = 16 * i + 8 * half + lane / 4;
      float sum = 0;
      for (int chunk = lane % 4; chunk < kValueWidth / 8 && row + r < n_tokens; chunk += 4) {
        const Vector<Number> a = load_16(d_o_tile + place<kValueWidth>(warp_row + r, chunk));
        const Vector<Number> b = load_16(o + (row + r) * token + 8 * chunk);
#pragma unroll
        for (int n = 0; n < 8; n++) sum += to_float(a.at[n]) * to_float(b.at[n]);
      }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      delta[i][half] = sum;
    }
}

}  // namespace

KERNEL(attention_backward_queries, Attention, p, kThreads) {
  SHARED(Number, shared);
  Number *const q_tile = shared, *const d_o_tile = shared + kRows * kWidth;
  const int head = blockIdx.y, group = head / (p.n_heads / p.n_kv_heads), batch = blockIdx.z;
  const int first = (gridDim.x - 1 - blockIdx.x) * kRows;
  const int lane = threadIdx.x % kLanes, warp_row = threadIdx.x / kLanes * kWarpRows, row = first + warp_row;
  const i64 row_of_head = (static_cast<i64>(batch) * p.n_heads + head) * p.n_tokens;
  const Visible visible{p};
  const KeyBlocks blocks(p, group, first, d_o_tile + kRows * kValueWidth);

  stage<kWidth, kRows>(q_tile, head_of(p.q, batch, head), p.q.token, first, p.n_tokens);
  stage<kValueWidth, kRows>(d_o_tile, head_of(p.d_o, batch, head), p.d_o.token, first, p.n_tokens);
  int key = blocks.begin();
  blocks.fetch(key, 0);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  float delta[kTiles][2], lse[kTiles][2], d_q[kTiles][kWidth / 8][4];
  row_sums(delta, d_o_tile, warp_row, head_of(p.o, batch, head), p.o.token, row, p.n_tokens);
#pragma unroll
  for (int i = 0; i < kTiles; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = row + 16 * i + 8 * half + lane / 4;
      lse[i][half] = r < p.n_tokens ? p.lse[row_of_head + r] * kLog2E : 0;
      if (lane % 4 == 0 && r < p.n_tokens) p.delta[row_of_head + r] = delta[i][half];
    }
  clear<kWidth>(d_q);

  for (int half = 0; key < blocks.end; half ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    const int next = blocks.next(key + kColumns);
    if (next < blocks.end) blocks.fetch(next, half ^ 1);
    cp_async_commit();
    if (key < row + kWarpRows) {
      const Number *k_tile = blocks.tile(half), *v_tile = k_tile + kColumns * kWidth;
      float s[kTiles][kColumns / 8][4], d_p[kTiles][kColumns / 8][4];
      clear<kColumns>(s), clear<kColumns>(d_p);
      multiply_rows<kWidth, kColumns>(s, q_tile, warp_row, k_tile);
      if (!visible.all(row, kWarpRows, key, kColumns)) hide<false>(s, row, key, visible);
      multiply_rows<kValueWidth, kColumns>(d_p, d_o_tile, warp_row, v_tile);
      for_each_sum<kColumns>([&](int i, int j, int e) {
        s[i][j][e] = exp2_fast(fmaf(s[i][j][e], p.scale * kLog2E, -lse[i][e / 2])) *
                     (d_p[i][j][e] - delta[i][e / 2]);
      });
      multiply_weights<kColumns, kWidth>(d_q, s, k_tile);
    }
    key = next;
  }

  store_rows<kWidth>(d_q, p.scale, head_of(p.d_q, batch, head), p.d_q.token, row, p.n_tokens);
}

}  // namespace tinyllm
