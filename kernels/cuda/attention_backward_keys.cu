// dK and dV of a block of keys: the queries of all heads that read them pass by.
//
//   P = exp(S - lse)   dV = P^T dO   dS = P (dO V^T - delta)   dK = scale dS^T Q
//
// The tables are transposed, rows are keys: then P^T and dS^T lie in the registers just as the products
// want their left operand. Runs after attention_backward_queries, which says more and writes delta.
#include "attention_mma.h"

namespace tinyllm {
namespace {

struct Step {
  int head, query;
};

}  // namespace

KERNEL(attention_backward_keys, Attention, p, kThreads) {
  SHARED(Number, shared);
  Number *const k_tile = shared, *const v_tile = shared + kRows * kWidth;
  Number* const q_tiles = v_tile + kRows * kValueWidth;
  constexpr int kHalf = kColumns * (kWidth + kValueWidth);
  float* const row_numbers = reinterpret_cast<float*>(q_tiles + 2 * kHalf);  // [half][lse, delta][query]
  const int group = blockIdx.y, batch = blockIdx.z, first = blockIdx.x * kRows;
  const int lane = threadIdx.x % kLanes, warp_row = threadIdx.x / kLanes * kWarpRows, row = first + warp_row;
  const int n_shared = p.n_heads / p.n_kv_heads;
  const Visible visible{p};

  // Steps: the blocks of queries that may see these keys, for one head after another.
  const i64 last = p.window ? static_cast<i64>(first) + kRows - 1 + p.window : p.n_tokens;
  const int end = last < p.n_tokens ? static_cast<int>(last) : p.n_tokens, last_head = (group + 1) * n_shared;
  const auto next_step = [&](Step step) {
    do {
      step.query += kColumns;
      if (step.query >= end) step.query = first, step.head++;
    } while (step.head < last_head && visible.apart(step.query, kColumns, first, kRows));
    return step;
  };
  const auto stage_step = [&](Step step, int half) {
    const int head = step.head, query = step.query;
    Number* tile = q_tiles + half * kHalf;
    stage<kWidth, kColumns>(tile, head_of(p.q, batch, head), p.q.token, query, p.n_tokens);
    stage<kValueWidth, kColumns>(tile + kColumns * kWidth, head_of(p.d_o, batch, head), p.d_o.token, query,
                                 p.n_tokens);
    if (threadIdx.x < 2 * kColumns) {  // past the end zeros: dO is 0 there and so are both gradients
      const int i = threadIdx.x % kColumns;
      const i64 at = (static_cast<i64>(batch) * p.n_heads + head) * p.n_tokens;
      const float* from = (threadIdx.x < kColumns ? p.lse : p.delta) + at;
      const bool is_real = query + i < p.n_tokens;
      cp_async_4(row_numbers + half * 2 * kColumns + threadIdx.x, from + (is_real ? query + i : 0), is_real);
    }
  };

  float d_k[kTiles][kWidth / 8][4], d_v[kTiles][kValueWidth / 8][4];
  clear<kWidth>(d_k), clear<kValueWidth>(d_v);
  stage<kWidth, kRows>(k_tile, head_of(p.k, batch, group), p.k.token, first, p.n_tokens);
  stage<kValueWidth, kRows>(v_tile, head_of(p.v, batch, group), p.v.token, first, p.n_tokens);
  Step step = {group * n_shared, first};
  stage_step(step, 0);
  cp_async_commit();
  for (int half = 0; step.head < last_head; half ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    const Step next = next_step(step);
    if (next.head < last_head) stage_step(next, half ^ 1);
    cp_async_commit();
    const int query = step.query;
    if (query + kColumns > row) {  // not before the warp's first key
      const Number *q_tile = q_tiles + half * kHalf, *d_o_tile = q_tile + kColumns * kWidth;
      const float *lse = row_numbers + half * 2 * kColumns, *delta = lse + kColumns;
      float s[kTiles][kColumns / 8][4], d_p[kTiles][kColumns / 8][4];
      clear<kColumns>(s);
      multiply_rows<kWidth, kColumns>(s, k_tile, warp_row, q_tile);
      if (!visible.all(query, kColumns, row, kWarpRows)) hide<true>(s, row, query, visible);
      for_each_sum<kColumns>([&](int i, int j, int e) {
        s[i][j][e] = exp2_fast(fmaf(s[i][j][e], p.scale, -lse[8 * j + lane % 4 * 2 + e % 2]) * kLog2E);
      });
      multiply_weights<kColumns, kValueWidth>(d_v, s, d_o_tile);
      for_each_sum<kColumns>([&](int i, int j, int e) { d_p[i][j][e] = -delta[8 * j + lane % 4 * 2 + e % 2]; });
      multiply_rows<kValueWidth, kColumns>(d_p, v_tile, warp_row, d_o_tile);
      for_each_sum<kColumns>([&](int i, int j, int e) { s[i][j][e] *= d_p[i][j][e]; });
      multiply_weights<kColumns, kWidth>(d_k, s, q_tile);
    }
    step = next;
  }

  store_rows<kValueWidth>(d_v, 1, head_of(p.d_v, batch, group), p.d_v.token, row, p.n_tokens);
  store_rows<kWidth>(d_k, p.scale, head_of(p.d_k, batch, group), p.d_k.token, row, p.n_tokens);
}

}  // namespace tinyllm
