// O and the log-sum-exp of a block of queries: keys and values pass by, block after block.
//
// While one block is worked on, the next one is on its way into the other half of the shared memory.
#include "attention_mma.h"
#include "attention_softmax.h"

namespace tinyllm {

KERNEL(attention_forward, Attention, p, kThreads) {
  SHARED(Number, shared);
  Number* const q_tile = shared;
  const int head = blockIdx.y, group = head / (p.n_heads / p.n_kv_heads), batch = blockIdx.z;
  const int first = (gridDim.x - 1 - blockIdx.x) * kRows;  // the longest rows begin first
  const int warp_row = threadIdx.x / kLanes * kWarpRows, row = first + warp_row;
  const Visible visible{p};
  const KeyBlocks blocks(p, group, first, shared + kRows * kWidth);

  Softmax softmax;
  softmax.begin();
  float o[kTiles][kValueWidth / 8][4], factor[kTiles][2];
  clear<kValueWidth>(o);

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
      float shrink[kTiles][2];
      softmax.update(s, shrink, p.scale * kLog2E);
      rescale(o, shrink);
      multiply_weights<kColumns, kValueWidth>(o, s, tile + kColumns * kWidth);
    }
    key = next;
  }

  float* lse = p.lse + (static_cast<i64>(batch) * p.n_heads + head) * p.n_tokens;
  softmax.finish(factor, lse, row, p.n_tokens, p.scale);
  store_rows<kValueWidth>(o, factor, head_of(p.o, batch, head), p.o.token, row, p.n_tokens);
}

}  // namespace tinyllm
