// INT8 weights times INT8 activations (quantize.cu made them), for many rows:
//
//   y = (float(sum_k q w) scale_x) scale_w, rounded to FORMAT
//
// Bit for bit tinyllm/ops/reference.py: the sum is a whole number, the products have an order. A
// block makes 128 x 128 numbers of y with 8 warps, each 64 rows x 32 outputs (one panel), in steps of
// 64 inputs; three stages of shared memory, two being filled while one is used.
#include "int8_weight.h"
#include "rows.h"

namespace tinyllm {

constexpr int kBlockRows = 128, kBlockPanels = 4, kStep = 64, kStages = 3;
constexpr int kThreads = 256;
constexpr int kRowBytes = kBlockRows * kStep, kWeightBytes = kBlockPanels * 2 * kTileBytes;
constexpr int kStageBytes = kRowBytes + kWeightBytes;

struct LinearW8a8 {
  Int8Weight weight;
  const i8* q;         // [rows][32 tiles], zeros behind the inputs
  const float* scale;  // [rows]
  FORMAT* y;           // [rows][outputs]
  i64 rows;
};

// Where 16 bytes of a row lie in its stage. Rows have 64 bytes; eight of them at the same column
// would hit two groups of banks, so each pair of rows turns its four columns another way.
__device__ __forceinline__ int place(int row, int column) {
  return row * kStep + ((column ^ (row / 2 % 4)) * 16);
}

// What a thread copies of each stage: 16 bytes of two rows and of two panels.
struct Feed {
  const i8 *rows[2], *panels[2];
  int to;  // in the stage, of the first row
};

__device__ __forceinline__ Feed feed_of(const LinearW8a8& p) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;
  const int panel = threadIdx.x / (2 * kTileBytes / 16), piece = threadIdx.x % (2 * kTileBytes / 16);
  Feed feed;
  feed.to = place(row, column);
#pragma unroll
  for (int i = 0; i < 2; i++) {  // beyond the last row or panel: the first; its sums are not stored
    const i64 source = static_cast<i64>(blockIdx.y) * kBlockRows + row + i * kBlockRows / 2;
    const i64 local = blockIdx.x * kBlockPanels + panel + i * kBlockPanels / 2;
    feed.rows[i] = p.q + (source < p.rows ? source : 0) * p.weight.tiles * kTile + column * 16;
    feed.panels[i] = p.weight.packed +
                     (local < p.weight.panels ? local : 0) * p.weight.tiles * kTileBytes + piece * 16;
  }
  return feed;
}

// Starts the copies of a stage. 64 rows on, the swizzle is the same.
__device__ __forceinline__ void fill(const Feed& feed, i8* stage, int step) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    cp_async_16(stage + feed.to + i * kRowBytes / 2, feed.rows[i] + step * kStep, true);
    i8* const to = stage + kRowBytes + i * kWeightBytes / 2 + threadIdx.x * 16;
    cp_async_16(to, feed.panels[i] + static_cast<i64>(step) * 2 * kTileBytes, true);
  }
}

// Adds the products of a stage: 2 x 32 inputs.
__device__ __forceinline__ void multiply(int (&sums)[4][4][4], const i8* stage, int first_row, int panel) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int half_step = 0; half_step < 2; half_step++) {
    u32 a[4][4];
#pragma unroll
    for (int m = 0; m < 4; m++) {  // matrices: rows 0-7, 8-15 of inputs 0-15, the same of 16-31
      const int row = first_row + m * 16 + lane % 16;
      ldmatrix_x4(a[m], stage + place(row, half_step * 2 + lane / 16));
    }
#pragma unroll
    for (int f = 0; f < 2; f++) {
      const i8* fragment = stage + kRowBytes + (panel * 2 + half_step) * kTileBytes + f * kFragment;
      const Vector<u32> w = load_16(reinterpret_cast<const u32*>(fragment + lane * 16));
#pragma unroll
      for (int m = 0; m < 4; m++) {
        mma_m16n8k32(sums[m][2 * f], a[m], {w.at[0], w.at[2]});
        mma_m16n8k32(sums[m][2 * f + 1], a[m], {w.at[1], w.at[3]});
      }
    }
  }
}

// Eight neighbouring outputs of one row.
__device__ __forceinline__ void store(const LinearW8a8& p, i64 row, int output, const int (&sums)[8],
                                      const float (&scales)[8]) {
  using Numbers = Vector<FORMAT>;
  const float scale = p.scale[row];
  FORMAT* const y = p.y + row * p.weight.outputs + output;
  Numbers out[8 / Numbers::kSize];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float product = __fmul_rn(static_cast<float>(sums[i]), scale);
    out[i / Numbers::kSize].at[i % Numbers::kSize] =
        from_float<FORMAT>(__fmul_rn(product, scales[i]));
  }
  if (p.weight.outputs % 8 == 0) {  // then every row begins at a multiple of 16 bytes
#pragma unroll
    for (int i = 0; i < 8 / Numbers::kSize; i++) store_16(y + i * Numbers::kSize, out[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (output + i < p.weight.outputs) y[i] = out[i / Numbers::kSize].at[i % Numbers::kSize];
  }
}

KERNEL(linear_w8a8, LinearW8a8, p, kThreads) {
  SHARED(i8, stages);  // [kStages][kStageBytes]
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int first_row = warp / kBlockPanels * 64, local_panel = warp % kBlockPanels;
  const int steps = p.weight.tiles / 2;
  const Feed feed = feed_of(p);
  int sums[4][4][4] = {};
#pragma unroll
  for (int i = 0; i < kStages - 1; i++) {
    if (i < steps) fill(feed, stages + i * kStageBytes, i);
    cp_async_commit();
  }
  for (int step = 0; step < steps; step++) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage is there for all, and all are done with the one before it
    const int next = step + kStages - 1;
    if (next < steps) fill(feed, stages + next % kStages * kStageBytes, next);
    cp_async_commit();
    multiply(sums, stages + step % kStages * kStageBytes, first_row, local_panel);
  }
  const int output = (blockIdx.x * kBlockPanels + local_panel) * kPanel + lane % 4 * 8;
  if (output >= p.weight.outputs) return;
  float scales[8];
  load_floats(p.weight.scale + output, scales);
#pragma unroll
  for (int m = 0; m < 4; m++)
#pragma unroll
    for (int below = 0; below < 2; below++) {
      const i64 row =
          static_cast<i64>(blockIdx.y) * kBlockRows + first_row + m * 16 + below * 8 + lane / 4;
      if (row >= p.rows) continue;
      int eight[8];
#pragma unroll
      for (int i = 0; i < 8; i++) eight[i] = sums[m][i / 2][below * 2 + i % 2];
      store(p, row, output, eight, scales);
    }
}

}  // namespace tinyllm
