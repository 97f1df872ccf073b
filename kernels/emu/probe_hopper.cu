// Small kernels for the tests of the emulator's wgmma, barriers and boxes: what they compute, and what is refused.
#include "hopper.h"

namespace tinyllm {

struct Arguments {
  TensorMap x;  // (1, 1, T, 128): boxes of 64 positions
  float* y;
  i64 n;
};

struct Shared {
  bf16 tiles[2][64 * 64], zeros[64];
  u64 barrier;
};

__device__ void load(Shared& shared, const Arguments& p, int token) {
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.barrier, 1);
    fence_proxy_async();
    mbarrier_expect(&shared.barrier, sizeof shared.tiles);
    for (int i = 0; i < 2; i++) copy_box(shared.tiles[i], &p.x, 64 * i, token, 0, 0, &shared.barrier);
  }
  __syncthreads();
  mbarrier_wait(&shared.barrier, 0);
}

// Each lane's place in D of 64 x columns.
__device__ void store(float* y, const float* d, int columns) {
  const int row = threadIdx.x / kLanes * 16 + threadIdx.x % kLanes / 4;
  for (int i = 0; i < columns / 2; i++)
    y[(row + i % 4 / 2 * 8) * columns + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = d[i];
}

// y (64 x 64) = X X^T over columns 16 n ... of the second tile; X: 64 positions from 32 on.
KERNEL(probe_rows, Arguments, p, 128) {
  SHARED_TILES(Shared, shared);
  load(shared, p, 32);
  float d[8][4];
  const u64 rows = descriptor(shared.tiles[1] + 16 * p.n, 0);
  wgmma_fence();
  wgmma_rows<bf16>(d, rows, rows, false);
  wgmma_commit();
  wgmma_wait<0>(d);
  store(p.y, d[0], 64);
}

// y (64 x 128) = 3 + A X over positions 16 n ...: A has a one in each row, see `one`.
KERNEL(probe_columns, Arguments, p, 128) {
  SHARED_TILES(Shared, shared);
  load(shared, p, 0);
  float d[16][4];
  for (int i = 0; i < 64; i++) d[0][i] = 3;
  const float one = threadIdx.x % 4 == threadIdx.x % kLanes / 4 % 4;  // row r of the lane, column 2 (r % 4)
  const unsigned a[4] = {pack<bf16>(one, 0), 0, 0, pack<bf16>(0, one)};  // of row r + 8: 9 columns on
  wgmma_fence();
  wgmma_columns<bf16>(d, a, descriptor(shared.tiles[0] + 16 * 64 * p.n, sizeof shared.tiles[0]));
  wgmma_commit();
  wgmma_wait<0>(d);
  store(p.y, d[0], 128);
}

// One fault for each n; see the test for what the emulator says.
KERNEL(probe_hopper_fault, Arguments, p, 128) {
  SHARED_TILES(Shared, shared);
  load(shared, p, 0);
  float d[8][4] = {};
  u64 rows = descriptor(shared.tiles[0], 0);
  if (p.n == 0) wgmma_rows<bf16>(d, rows, rows, false);
  wgmma_fence();
  if (p.n == 1) rows &= ~(u64{3} << 62);
  if (p.n == 2) rows += 4096;
  if (p.n == 3 && threadIdx.x < 64) rows += 2;
  wgmma_rows<bf16>(d, rows, rows, false);
  wgmma_commit();
  if (p.n == 4) wgmma_wait<1>(d);
  if (p.n == 5) return;
  wgmma_wait<0>(d);
  if (threadIdx.x > 0) return;
  if (p.n == 6) mbarrier_wait(&shared.barrier, 1);
  if (p.n == 7) mbarrier_arrive(&shared.barrier), mbarrier_expect(&shared.barrier, 8), mbarrier_arrive(&shared.barrier);
  if (p.n == 8) mbarrier_wait(&shared.barrier + 1, 0);
  if (p.n == 9) copy_box(shared.tiles[0] + 8, &p.x, 0, 0, 0, 0, &shared.barrier);
  if (p.n == 10) mbarrier_init(&shared.barrier, 1), copy_box(shared.tiles[0], &p.x, 0, 0, 0, 0, &shared.barrier);
  if (p.n == 11) {
    mbarrier_expect(&shared.barrier, sizeof shared.tiles[0]);
    copy_box(shared.tiles[0], &p.x, 0, 0, 0, 0, &shared.barrier);
  }
}

}  // namespace tinyllm
