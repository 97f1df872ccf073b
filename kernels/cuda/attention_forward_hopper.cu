// attention_forward.cu for Hopper: wgmma multiplies, and the copy engine (TMA) fetches.
//
// Each of WARPGROUPS warpgroups owns 64 queries. One more, the producer, has a single lane at work: it asks for keys
// and values up to STAGES blocks ahead; its registers go to the others. While a warpgroup makes weights of one block's
// scores, the tensor cores multiply the block before by its values (Shah et al. 2024, arXiv:2407.08608, algorithm 2).
#include "attention_softmax.h"
#include "hopper.h"

namespace tinyllm {
namespace {

constexpr int kWarpgroups = WARPGROUPS, kStages = STAGES, kGroupRows = 64, kRows = kWarpgroups * kGroupRows;
constexpr int kConsumers = 4 * kWarpgroups, kThreads = (kConsumers + 4) * kLanes;  // warps; with the producer's
constexpr int kProducerRegisters = kWarpgroups == 2 ? 24 : 32, kConsumerRegisters = kWarpgroups == 2 ? 240 : 160;
static_assert(384 % kRows == 0 && 384 % kColumns == 0, "`documents` has whole blocks");
static_assert(kTiles == 1, "a warp of a warpgroup owns 16 rows");
static_assert(kWidth % kTileWidth == 0 && kValueWidth % kTileWidth == 0, "whole tiles");

struct Shared {
  Number q[kRows * kWidth], k[kStages][kColumns * kWidth], v[kStages][kColumns * kValueWidth];
  u64 q_full, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

// Which of the stages the n-th block takes, and the parity of its phase there.
__device__ __forceinline__ int stage_of(int n) { return n % kStages; }
__device__ __forceinline__ int parity_of(int n) { return n / kStages & 1; }

// Asks for rows `row` ... of a head; `full` is over when they are there.
template <int kWidth, int kRows>
__device__ __forceinline__ void fetch(Number* tile, const TensorMap& map, int row, int head, u64* full) {
  mbarrier_expect(full, kRows * kWidth * sizeof(Number));
  for (int column = 0; column < kWidth; column += kTileWidth)
    copy_box(tile + column * kRows, &map, column, row, head, blockIdx.z, full);
}

// Starts S = Q K^T for 64 rows from `q` on and a block of keys.
__device__ __forceinline__ void multiply_keys(float (&s)[kTiles][kColumns / 8][4], const Number* q, const Number* k) {
#pragma unroll
  for (int depth = 0; depth < kWidth; depth += 16) {
    const int tile = depth / kTileWidth * kTileWidth, column = depth % kTileWidth;
    wgmma_rows<Number>(s[0], descriptor(q + tile * kRows + column, 0), descriptor(k + tile * kColumns + column, 0),
                       depth > 0);
  }
}

// Starts O += P V.
__device__ __forceinline__ void multiply_values(float (&o)[kTiles][kValueWidth / 8][4],
                                                const unsigned (&weights)[kColumns / 16][4], const Number* v) {
#pragma unroll
  for (int key = 0; key < kColumns; key += 16)
    wgmma_columns<Number>(o[0], weights[key / 16], descriptor(v + key * kTileWidth, kColumns * kRowBytes));
}

// Weights as the left operand: a lane's sums are just what it must hold.
__device__ __forceinline__ void pack_weights(unsigned (&weights)[kColumns / 16][4],
                                             const float (&s)[kTiles][kColumns / 8][4]) {
#pragma unroll
  for (int i = 0; i < kColumns / 16; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float* pair = s[0][2 * i + e / 2] + e % 2 * 2;
      weights[i][e] = pack<Number>(pair[0], pair[1]);
    }
}

// Hides keys of other documents; `queries`, `keys`: documents of the first row, of the first column.
__device__ __forceinline__ void hide_documents(float (&s)[kTiles][kColumns / 8][4], const i32* queries,
                                               const i32* keys) {
  const int lane = threadIdx.x % kLanes;
  const i32 own[2] = {queries[lane / 4], queries[lane / 4 + 8]};
#pragma unroll
  for (int j = 0; j < kColumns / 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (own[e / 2] != keys[8 * j + lane % 4 * 2 + e % 2]) s[0][j][e] = -kInfinity;
}

}  // namespace

struct HopperAttention {
  TensorMap q, k, v;
  Attention problem;
};
static_assert(sizeof(HopperAttention) == 3 * sizeof(TensorMap) + sizeof(Attention), "as the host packs it");

KERNEL(attention_forward_hopper, HopperAttention, maps, kThreads) {
  SHARED_TILES(Shared, shared);
  const Attention& p = maps.problem;
  const int head = blockIdx.y, group = head / (p.n_heads / p.n_kv_heads), batch = blockIdx.z;
  const int first = (gridDim.x - 1 - blockIdx.x) * kRows;  // the longest rows begin first
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const Visible visible{p};

  const int begin = p.window ? max(first - p.window + 1, 0) / kColumns * kColumns : 0;
  const int end = min(first + kRows, p.n_tokens);
  const auto next_block = [&](int key) {
    while (key < end && visible.apart(first, kRows, key, kColumns)) key += kColumns;
    return key;
  };

  if (threadIdx.x == 0) {
    mbarrier_init(&shared.q_full, 1);
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(&shared.k_full[i], 1), mbarrier_init(&shared.v_full[i], 1);
      mbarrier_init(&shared.k_empty[i], kConsumers), mbarrier_init(&shared.v_empty[i], kConsumers);
    }
    fence_proxy_async();
  }
  __syncthreads();

  if (warp >= kConsumers) {
    give_registers<kProducerRegisters>();
    if (warp > kConsumers || lane > 0) return;
    fetch<kWidth, kRows>(shared.q, maps.q, first, head, &shared.q_full);
    for (int n = 0, key = next_block(begin); key < end; n++, key = next_block(key + kColumns)) {
      const int stage = stage_of(n), before = parity_of(n) ^ 1;
      mbarrier_wait(&shared.k_empty[stage], before);
      fetch<kWidth, kColumns>(shared.k[stage], maps.k, key, group, &shared.k_full[stage]);
      mbarrier_wait(&shared.v_empty[stage], before);
      fetch<kValueWidth, kColumns>(shared.v[stage], maps.v, key, group, &shared.v_full[stage]);
    }
    return;
  }

  take_registers<kConsumerRegisters>();
  const int row = first + 16 * warp;
  const Number* q = shared.q + warp / 4 * kGroupRows * kTileWidth;
  Softmax softmax;
  softmax.begin();
  float s[kTiles][kColumns / 8][4], o[kTiles][kValueWidth / 8][4], shrink[kTiles][2];
  unsigned weights[kColumns / 16][4];
  clear<kValueWidth>(o);

  const auto start_keys = [&](int n) {
    mbarrier_wait(&shared.k_full[stage_of(n)], parity_of(n));
    wgmma_fence();
    multiply_keys(s, q, shared.k[stage_of(n)]);
    wgmma_commit();
  };
  const auto start_values = [&](int n) {
    mbarrier_wait(&shared.v_full[stage_of(n)], parity_of(n));
    wgmma_fence();
    multiply_values(o, weights, shared.v[stage_of(n)]);
    wgmma_commit();
  };
  const auto release = [&](u64* empty) {
    if (lane == 0) mbarrier_arrive(empty);
  };
  const auto weigh = [&](int key) {
    if (!visible.all(row, 16, key, kColumns)) {
      hide<false>(s, row, key, [&](int query, int k) {
        return k <= query && (p.window == 0 || query - k < p.window);
      });
      if (p.documents) hide_documents(s, visible.documents() + row, visible.documents() + key);
    }
    softmax.update(s, shrink, p.scale * kLog2E);
  };

  mbarrier_wait(&shared.q_full, 0);
  int n = 0, key = next_block(begin);
  start_keys(0);
  wgmma_wait<0>(s[0]);
  release(&shared.k_empty[0]);
  weigh(key);
  pack_weights(weights, s);
  for (key = next_block(key + kColumns); key < end; key = next_block(key + kColumns), n++) {
    start_keys(n + 1);
    start_values(n);  // runs while this warpgroup weighs the next scores
    wgmma_wait<1>(s[0]);
    release(&shared.k_empty[stage_of(n + 1)]);
    weigh(key);
    wgmma_wait<0>(o[0]);
    release(&shared.v_empty[stage_of(n)]);
    rescale(o, shrink);
    pack_weights(weights, s);
  }
  start_values(n);
  wgmma_wait<0>(o[0]);

  float factor[kTiles][2];
  float* lse = p.lse + (static_cast<i64>(batch) * p.n_heads + head) * p.n_tokens;
  softmax.finish(factor, lse, row, p.n_tokens, p.scale);
  store_rows<kValueWidth>(o, factor, head_of(p.o, batch, head), p.o.token, row, p.n_tokens);
}

}  // namespace tinyllm
