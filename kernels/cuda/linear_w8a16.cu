// INT8 weights times a few 16-bit vectors, for decoding: y = (x W^T) scale, M <= 8 rows of x.
//
// Its time is that of reading W once. A block takes a panel of 32 outputs, its 8 warps take turns at
// the tiles along K: a lane reads 16 bytes, which are one operand of mma (rows: outputs), widens them
// to FORMAT and multiplies them by the x of its 4 inputs (columns: rows of x, up to 8 for free).
// Sums are fp32, within a warp in the tensor core, over the warps in a fixed order.
#include "int8_weight.h"

namespace tinyllm {

constexpr int kWarps = 8, kTurn = 4;         // tiles that a warp takes at once
constexpr int kRows = 8, kPitch = kPanel + 1;  // floats per row of x; + 1: no bank is hit twice

struct LinearW8a16 {
  Int8Weight weight;
  const FORMAT* x;  // [rows][inputs], inputs a multiple of 4
  FORMAT* y;        // [rows][outputs]
  i32 rows;         // at most 8
};

// What x has in the four inputs from k on: the second operand's two registers.
__device__ __forceinline__ uint2 load_inputs(const LinearW8a16& p, int row, int k) {
  const bool inside = row < p.rows && k < p.weight.inputs;
  const i64 at = static_cast<i64>(row) * p.weight.inputs + k;
  return inside ? *reinterpret_cast<const uint2*>(p.x + at) : uint2{0, 0};
}

__device__ __forceinline__ void multiply(float (&sums)[4], u32 top, u32 bottom, uint2 x) {
  u32 a[4];  // two neighbours of the four inputs count as columns 2 c, 2 c + 1, two as 8 more
  widen_bytes<FORMAT>(top, a[0], a[2]);
  widen_bytes<FORMAT>(bottom, a[1], a[3]);
  mma_m16n8k16<FORMAT>(sums, a, {x.x, x.y});
}

// The tiles from `first` on; beyond the last one nothing, or its neighbour, as x is 0 there.
__device__ __forceinline__ void load_turn(uint4 (&w)[kTurn][2], const Int8Weight& weight, const i8* lane,
                                          int first) {
  if (first >= weight.tiles) return;
#pragma unroll
  for (int i = 0; i < kTurn; i++)
#pragma unroll
    for (int f = 0; f < 2; f++) {
      const i64 tile = min(first + i, weight.tiles - 1);
      w[i][f] = load_once(lane + tile * kTileBytes + f * kFragment);
    }
}

KERNEL(linear_w8a16, LinearW8a16, p, kWarps * kLanes) {
  SHARED(float, partial);  // [kWarps][kRows][kPitch]
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, panel = blockIdx.x;
  const i8* const weights =
      p.weight.packed + static_cast<i64>(panel) * p.weight.tiles * kTileBytes + lane * 16;
  float sums[2][4] = {};
  uint4 now[kTurn][2], next[kTurn][2];
  load_turn(now, p.weight, weights, warp * kTurn);
  for (int first = warp * kTurn; first < p.weight.tiles; first += kWarps * kTurn) {
    // Loaded for the next turn: else the compiler moves each load to its use, and of 8 that could be
    // in flight two are.
    load_turn(next, p.weight, weights, first + kWarps * kTurn);
#pragma unroll
    for (int i = 0; i < kTurn; i++) {
      const int k = (first + i) * kTile + lane % 4 * 4;
      const uint2 low = load_inputs(p, lane / 4, k), high = load_inputs(p, lane / 4, k + 16);
#pragma unroll
      for (int f = 0; f < 2; f++) {
        multiply(sums[f], now[i][f].x, now[i][f].y, low);
        multiply(sums[f], now[i][f].z, now[i][f].w, high);
        now[i][f] = next[i][f];
      }
    }
  }
#pragma unroll
  for (int f = 0; f < 2; f++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int g = lane / 4, output = 8 * (g / 2) + 4 * f + 2 * (i / 2) + g % 2;
      const int row = lane % 4 * 2 + i % 2;
      partial[(warp * kRows + row) * kPitch + output] = sums[f][i];
    }
  __syncthreads();
  const int row = threadIdx.x / kPanel, output = panel * kPanel + threadIdx.x % kPanel;
  if (row >= p.rows || output >= p.weight.outputs) return;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; i++) sum += partial[(i * kRows + row) * kPitch + threadIdx.x % kPanel];
  p.y[static_cast<i64>(row) * p.weight.outputs + output] =
      from_float<FORMAT>(sum * p.weight.scale[output]);
}

}  // namespace tinyllm
