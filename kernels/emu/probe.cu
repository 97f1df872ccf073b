// A kernel that uses everything of device.h once; only the emulator's tests run it.
#include "device.h"

namespace tinyllm {

struct SumArguments {
  const float* x;
  float* y;
  i64 n;
};

// y[block] = sum of the block's share of x, by shuffles and shared memory.
KERNEL(probe_sum, SumArguments, p, 256) {
  SHARED(float, partial);
  float sum = 0;
  const i64 n = p.n / gridDim.x;
  for (i64 i = threadIdx.x; i < n; i += blockDim.x) sum += p.x[blockIdx.x * n + i];
  sum = warp_sum(sum);
  if (threadIdx.x % kLanes == 0) partial[threadIdx.x / kLanes] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (u32 w = 0; w < blockDim.x / kLanes; w++) total += partial[w];
    p.y[blockIdx.x] = total;
  }
}

}  // namespace tinyllm
