// Small kernels for the tests of the emulator itself: what it computes, and what it refuses.
#include "device.h"

namespace tinyllm {

struct Arguments {
  const void* x;
  const void* w;
  void* y;
  i64 n;
};

// y[block] = sum of the block's share of x, by shuffles and shared memory.
KERNEL(probe_sum, Arguments, p, 256) {
  SHARED(float, partial);
  const float* x = static_cast<const float*>(p.x);
  float sum = 0;
  const i64 n = p.n / gridDim.x;
  for (i64 i = threadIdx.x; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
  sum = warp_sum(sum);
  if (threadIdx.x % kLanes == 0) partial[threadIdx.x / kLanes] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (u32 w = 0; w < blockDim.x / kLanes; w++) total += partial[w];
    static_cast<float*>(p.y)[blockIdx.x] = total;
  }
}

// What each lane gets from the collectives: 7 words.
KERNEL(probe_warp, Arguments, p, 32) {
  const int lane = threadIdx.x, x = 10 * lane;
  int* y = static_cast<int*>(p.y) + 7 * lane;
  y[0] = __shfl_xor_sync(kAllLanes, x, 3);
  y[1] = __shfl_sync(kAllLanes, x, 5);
  y[2] = __shfl_down_sync(kAllLanes, x, 4);
  y[3] = __shfl_up_sync(kAllLanes, x, 4);
  y[4] = static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0));
  y[5] = __any_sync(kAllLanes, lane == 7) + 2 * __all_sync(kAllLanes, lane < 31);
  y[6] = static_cast<int>(warp_max(static_cast<float>(x)));
}

// y = x to bf16, to fp16 and back: floats in, four floats out.
KERNEL(probe_formats, Arguments, p, 32) {
  for (i64 i = threadIdx.x; i < p.n; i += blockDim.x) {
    const float x = static_cast<const float*>(p.x)[i];
    float* y = static_cast<float*>(p.y) + 2 * i;
    y[0] = to_float(from_float<bf16>(x));
    y[1] = to_float(from_float<half>(x));
  }
}

// y (16 x 8) = x (16 x 16) w (8 x 16)^T of bf16, through shared memory and ldmatrix.
KERNEL(probe_mma, Arguments, p, 32) {
  SHARED(bf16, tile);
  const int lane = threadIdx.x;
  for (int i = lane; i < 48; i += kLanes)  // 24 rows of 32 bytes
    cp_async_16(tile + 8 * i, static_cast<const bf16*>(i < 32 ? p.x : p.w) + 8 * (i < 32 ? i : i - 32), true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  unsigned a[4], both[4];
  ldmatrix_x4(a, tile + (lane % 16) * 16 + lane / 16 * 8);
  ldmatrix_x4(both, tile + 16 * 16 + (lane % 8) * 16 + lane / 8 % 2 * 8);
  const unsigned b[2] = {both[0], both[1]};
  float d[4] = {};
  mma_m16n8k16<bf16>(d, a, b);
  for (int i = 0; i < 4; i++) static_cast<float*>(p.y)[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// y (16 x 8) = x (16 x 32) w (8 x 32)^T of signed bytes.
KERNEL(probe_mma_s8, Arguments, p, 32) {
  const int lane = threadIdx.x;
  const u32 *x = static_cast<const u32*>(p.x), *w = static_cast<const u32*>(p.w);
  unsigned a[4], b[2];
  for (int i = 0; i < 4; i++) a[i] = x[(lane / 4 + i % 2 * 8) * 8 + lane % 4 + i / 2 * 4];
  for (int i = 0; i < 2; i++) b[i] = w[lane / 4 * 8 + lane % 4 + i * 4];
  int d[4] = {};
  mma_m16n8k32(d, a, b);
  for (int i = 0; i < 4; i++) static_cast<int*>(p.y)[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// One fault for each n; see the test for what the emulator says.
KERNEL(probe_fault, Arguments, p, 64) {
  SHARED(float, tile);
  float* y = static_cast<float*>(p.y);
  const int thread = threadIdx.x;
  if (p.n == 0 && thread == 40) return;
  if (p.n == 1 && thread < 32) __syncwarp();
  if (p.n == 2 && thread % 2) warp_sum(1);
  if (p.n == 3) tile[thread == 63 ? 64 : thread] = 0;
  if (p.n == 4) tile[thread == 0 ? -28708 : thread] = 0;
  if (p.n == 5) load_16(tile + thread);
  if (p.n == 6) cp_async_16(tile + 4 * thread, y, true);
  if (p.n == 7 && thread % 2) __shfl_xor_sync(kAllLanes, 1, 1);
  if (p.n == 8) __shfl_xor_sync(0xffu, 1, 1);
  if (p.n == 9) y[i64{1} << 40] = 0;
  if (p.n == 10 && thread < 32) __syncthreads();
  if (p.n == 11) { unsigned out[4]; ldmatrix_x4(out, tile + thread); }
  if (p.n == 12) {  // not a fault the emulator names: what was never written is NaN, even as bf16
    y[thread] = to_float(from_float<bf16>(tile[thread]));
    return;
  }
  if (p.n == 13 && thread < 16) {  // a copy that no one waits for does not arrive
    cp_async_16(tile + 4 * thread, p.x, true);
    cp_async_commit();
    y[thread] = tile[4 * thread];
  }
  __syncthreads();
}

// atomicAdd from every thread of every block.
KERNEL(probe_atomic, Arguments, p, 64) { atomicAdd(static_cast<int*>(p.y), static_cast<int>(threadIdx.x)); }

}  // namespace tinyllm
