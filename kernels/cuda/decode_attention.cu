// Attention of one new query per sequence over its KV cache: y = softmax(scale q K^T) V.
//
// Its time is that of reading the cache once, so the cache is split: a block takes a chunk of the keys
// of one key-value head, and all queries that share this head, and leaves sums, largest score and sum
// of weights behind; decode_attention_combine joins the chunks (Dao et al. 2022,
// arXiv:2205.14135, section 3.1).
//
// WIDTH / 8 lanes read a key (16 bytes each, 8 if the cache is INT8), a warp several keys at once and
// kTurn such before it computes. Scores go to shared memory, so the pass over the values knows all of
// the chunk's weights. Defines: WIDTH (32, 64, 128), FORMAT of queries, CACHE (FORMAT or i8).
#include "device.h"

namespace tinyllm {

constexpr int kSize = 8, kParts = WIDTH / kSize, kKeys = kLanes / kParts;
constexpr int kWarps = 4, kTurn = 4, kHeads = 8, kMaxChunk = 256;

struct DecodeAttention {
  const FORMAT* q;                 // [batch][heads][WIDTH]
  const CACHE *k, *v;              // [batch][kv_heads][capacity][WIDTH]
  const float *k_scale, *v_scale;  // [batch][kv_heads][capacity], for INT8
  const i32* lengths;              // [batch], keys there are: on the card, so that a graph may replay
  float *sums, *stats;             // [batch][heads][gridDim.x][WIDTH], [...][2]: top, sum of weights
  i64 capacity;
  i32 heads, kv_heads, chunk;      // chunk at most kMaxChunk
  i32 window;                      // only the last so many keys; 0: all
  float scale;                     // with log2 e, as weights are powers of 2
};

struct Eight {
  float at[kSize];
};

template <class T>
__device__ __forceinline__ Eight load_eight(const T* p) {
  const Vector<T> v = load_16(p);
  Eight x;
#pragma unroll
  for (int e = 0; e < kSize; e++) x.at[e] = to_float(v.at[e]);
  return x;
}
template <>
__device__ __forceinline__ Eight load_eight<i8>(const i8* p) {
  const uint2 bytes = *reinterpret_cast<const uint2*>(p);
  Eight x;
#pragma unroll
  for (int e = 0; e < kSize; e++)
    x.at[e] = static_cast<float>(static_cast<i8>((e < 4 ? bytes.x : bytes.y) >> 8 * (e % 4)));
  return x;
}

// The chunk's keys that count: [first, first + n).
struct Keys {
  int first, n;
};
__device__ __forceinline__ Keys keys_of(const DecodeAttention& p, int length) {
  const int begin = p.window && length > p.window ? length - p.window : 0;
  const int first = max(static_cast<int>(blockIdx.x) * p.chunk, begin);
  return {first, min((static_cast<int>(blockIdx.x) + 1) * p.chunk, length) - first};
}

// Which key of the chunk this lane's i-th is, in a round that begins at `base`.
__device__ __forceinline__ int key_index(int base, int i) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  return base + (i * kWarps + warp) * kKeys + lane / kParts;
}
constexpr int kRound = kTurn * kWarps * kKeys;

// This lane's part of its keys (or values) of a round; beyond the last key that one again, whose weight is 0.
__device__ __forceinline__ void load_turn(Eight (&out)[kTurn], const CACHE* rows, Keys keys, int base) {
#pragma unroll
  for (int i = 0; i < kTurn; i++) {
    const i64 at = keys.first + min(key_index(base, i), keys.n - 1);
    out[i] = load_eight(rows + at * WIDTH + threadIdx.x % kParts * kSize);
  }
}

// scores[h][i] = (scale q_h) k_i.
__device__ __forceinline__ void score(const CACHE* k, const float* k_scale, Keys keys, int n_heads,
                                      const float* queries, float* scores) {
  const int part = threadIdx.x % kParts;
  for (int base = 0; base < keys.n; base += kRound) {
    Eight key[kTurn];
    load_turn(key, k, keys, base);
    for (int h = 0; h < n_heads; h++) {
      const Vector<float> low = load_16(queries + h * WIDTH + part * kSize);
      const Vector<float> high = load_16(queries + h * WIDTH + part * kSize + 4);
      float sums[kTurn] = {};
#pragma unroll
      for (int i = 0; i < kTurn; i++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          sums[i] += low.at[e] * key[i].at[e] + high.at[e] * key[i].at[e + 4];
#pragma unroll
      for (int bits = kParts / 2; bits; bits /= 2)
#pragma unroll
        for (int i = 0; i < kTurn; i++) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], bits);
#pragma unroll
      for (int i = 0; i < kTurn; i++) {
        const int index = key_index(base, i);
        if (part == 0 && index < keys.n)
          scores[h * kMaxChunk + index] = k_scale ? sums[i] * k_scale[keys.first + index] : sums[i];
      }
    }
  }
}

// Scores become weights exp2(score - top), of the values as they are stored; a warp takes a head.
__device__ __forceinline__ void weigh(const float* v_scale, Keys keys, float* scores, float* stats) {
  const int lane = threadIdx.x % kLanes;
  float top = -kInfinity, sum = 0;
  for (int i = lane; i < keys.n; i += kLanes) top = fmaxf(top, scores[i]);
  top = warp_max(top);
  for (int i = lane; i < keys.n; i += kLanes) {
    const float weight = exp2_fast(scores[i] - top);
    sum += weight;
    scores[i] = v_scale ? weight * v_scale[keys.first + i] : weight;
  }
  sum = warp_sum(sum);
  if (lane == 0) stats[0] = top, stats[1] = sum;
}

// joined[warp][h][...] = the weighted values of the warp's keys.
__device__ __forceinline__ void add_values(const CACHE* v, Keys keys, int n_heads, const float* weights,
                                           float* joined) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, part = lane % kParts;
  Eight sums[kHeads] = {};
  for (int base = 0; base < keys.n; base += kRound) {
    Eight value[kTurn];
    load_turn(value, v, keys, base);
#pragma unroll
    for (int h = 0; h < kHeads; h++) {
      if (h >= n_heads) break;
#pragma unroll
      for (int i = 0; i < kTurn; i++) {
        const int index = key_index(base, i);
        const float weight = index < keys.n ? weights[h * kMaxChunk + index] : 0.0f;
#pragma unroll
        for (int e = 0; e < kSize; e++) sums[h].at[e] += weight * value[i].at[e];
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kHeads; h++) {
    if (h >= n_heads) break;
#pragma unroll
    for (int e = 0; e < kSize; e++) {
#pragma unroll
      for (int bits = kParts; bits < kLanes; bits *= 2)
        sums[h].at[e] += __shfl_xor_sync(kAllLanes, sums[h].at[e], bits);
      if (lane < kParts) joined[(warp * kHeads + h) * WIDTH + part * kSize + e] = sums[h].at[e];
    }
  }
}

KERNEL(decode_attention, DecodeAttention, p, kWarps * kLanes) {
  SHARED(float, queries);                          // [kHeads][WIDTH]
  float* const scores = queries + kHeads * WIDTH;  // [kHeads][kMaxChunk]
  float* const joined = scores + kHeads * kMaxChunk;  // [kWarps][kHeads][WIDTH]
  const int shared_by = p.heads / p.kv_heads, tiles = (shared_by + kHeads - 1) / kHeads;
  const int group = blockIdx.y / tiles, tile = blockIdx.y % tiles, batch = blockIdx.z;
  const Keys keys = keys_of(p, p.lengths[batch]);
  if (keys.n <= 0) return;  // the whole block
  const int n_heads = min(kHeads, shared_by - tile * kHeads);
  const i64 head = static_cast<i64>(batch) * p.heads + group * shared_by + tile * kHeads;
  const i64 row = (static_cast<i64>(batch) * p.kv_heads + group) * p.capacity;
  for (int i = threadIdx.x; i < n_heads * WIDTH; i += kWarps * kLanes)
    queries[i] = to_float(p.q[head * WIDTH + i]) * p.scale;
  __syncthreads();
  score(p.k + row * WIDTH, p.k_scale ? p.k_scale + row : nullptr, keys, n_heads, queries, scores);
  __syncthreads();
  for (int h = threadIdx.x / kLanes; h < n_heads; h += kWarps)
    weigh(p.v_scale ? p.v_scale + row : nullptr, keys, scores + h * kMaxChunk,
          p.stats + ((head + h) * gridDim.x + blockIdx.x) * 2);
  __syncthreads();
  add_values(p.v + row * WIDTH, keys, n_heads, scores, joined);
  __syncthreads();
  for (int i = threadIdx.x; i < n_heads * WIDTH; i += kWarps * kLanes) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += joined[w * kHeads * WIDTH + i];
    p.sums[((head + i / WIDTH) * gridDim.x + blockIdx.x) * WIDTH + i % WIDTH] = sum;
  }
}

struct DecodeCombine {
  const float *sums, *stats;  // as above
  const i32* lengths;
  FORMAT* y;                  // [batch][heads][WIDTH]
  i32 splits, chunk, window;
};

// A block of 128 threads per head and sequence: thread d makes number d.
KERNEL(decode_attention_combine, DecodeCombine, p, 128) {
  const i64 head = static_cast<i64>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int length = p.lengths[blockIdx.y];
  const int begin = p.window && length > p.window ? length - p.window : 0;
  const float* const stats = p.stats + head * p.splits * 2;
  const int first = begin / p.chunk, last = (length - 1) / p.chunk;
  float top = -kInfinity;
  for (int i = first; i <= last; i++) top = fmaxf(top, stats[2 * i]);
  if (threadIdx.x >= WIDTH) return;
  float weights = 0, sum = 0;
#pragma unroll 4
  for (int i = first; i <= last; i++) {
    const float share = exp2_fast(stats[2 * i] - top);
    weights += share * stats[2 * i + 1];
    sum += share * p.sums[(head * p.splits + i) * WIDTH + threadIdx.x];
  }
  p.y[head * WIDTH + threadIdx.x] = from_float<FORMAT>(sum / weights);
}

}  // namespace tinyllm
