// Instructions of Hopper in PTX, for sm_90a only; kernels/emu/hopper_instructions.h has the same in C++.
// Products take a warpgroup: four warps, the first a multiple of four; all lanes must call.
#pragma once
#include "device.h"

namespace tinyllm {

// What the copy engine (TMA) knows of a tensor (B, heads, T, width); the driver fills it in, tinyllm/ops/tensor_map.py.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// ---- barriers in shared memory: a phase ends with its `count`th arrival, when its bytes are there, too ----

__device__ __forceinline__ void mbarrier_init(u64* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// Shows this thread's barriers to the copy engine.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives and tells how many bytes the phase waits for.
__device__ __forceinline__ void mbarrier_expect(u64* barrier, int n_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_bytes)
               : "memory");
}
// Waits for the end of the latest phase of this parity: the first phase has 0. Of 1, at first: does not wait.
__device__ __forceinline__ void mbarrier_wait(u64* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred over;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done;\nbra again;\ndone:\n}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// Starts the copy of a box of the map to shared memory, where it lies swizzled; what the tensor lacks is zeros.
// Whoever waits for the barrier sees the bytes.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap* map, int column, int token, int head, int batch,
                                         u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(shared)), "l"(map), "r"(column), "r"(token),
      "r"(head), "r"(batch), "r"(shared_address(barrier)) : "memory");
}

// Gives registers of this warpgroup's threads back, or takes of what others gave; kCount is what each then has.
template <int kCount>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount)); }
template <int kCount>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount)); }

// ---- products of a warpgroup: D (64 x N, fp32) += A (64 x 16) B (16 x N), N = 64 or 128 ----
//
// Warp w of the four holds rows 16 w ... of D, and of A where A is in registers: the fragments of mma_m16n8k16.
// Products run beside the program. After wgmma_fence they may take the registers they are given; those of D
// belong to them until wgmma_wait. Products with the same D follow each other in order.

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the last kLeft groups are done: those of `d` among them.
template <int kLeft, int kTiles>
__device__ __forceinline__ void wgmma_wait(float (&d)[kTiles][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#pragma unroll
  for (int j = 0; j < kTiles; j++)  // or the compiler may read them before
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+f"(d[j][e])::"memory");
}

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

#define SUMS_4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define SUMS_16(j) SUMS_4(j), SUMS_4(j + 1), SUMS_4(j + 2), SUMS_4(j + 3)
#define SUMS_32 SUMS_16(0), SUMS_16(4)
#define SUMS_64 SUMS_32, SUMS_16(8), SUMS_16(12)
#define NAMES_32                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                    \
  NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "     \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(n, type, sums) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" NAMES_##sums "}, "

// A and B by descriptors, both with the summed dimension along the rows of 128 bytes. Not `more`: D = A B.
#define ROWS(n, type, sums, a, b, more_)                                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " more_ ", 0;\n" WGMMA(n, type, sums) a ", " b ", p, 1, 1, 0, 0;\n}" \
               : SUMS_##sums : "l"(rows), "l"(others), "r"(static_cast<int>(more)))
template <class T, int kTiles>
__device__ __forceinline__ void wgmma_rows(float (&d)[kTiles][4], u64 rows, u64 others, bool more) {
  if constexpr (kTiles == 8 && kIsBf16<T>) ROWS(64, "bf16", 32, "%32", "%33", "%34");
  if constexpr (kTiles == 8 && !kIsBf16<T>) ROWS(64, "f16", 32, "%32", "%33", "%34");
  if constexpr (kTiles == 16 && kIsBf16<T>) ROWS(128, "bf16", 64, "%64", "%65", "%66");
  if constexpr (kTiles == 16 && !kIsBf16<T>) ROWS(128, "f16", 64, "%64", "%65", "%66");
}

// A from registers; B by descriptor, its N columns along the rows of 128 bytes, the summed dimension across.
#define COLUMNS_OF(n, type, sums, a, b)                                                     \
  asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n" WGMMA(n, type, sums) a ", " b ", p, 1, 1, 1;\n}" \
               : SUMS_##sums : "r"(a_[0]), "r"(a_[1]), "r"(a_[2]), "r"(a_[3]), "l"(columns))
template <class T, int kTiles>
__device__ __forceinline__ void wgmma_columns(float (&d)[kTiles][4], const unsigned (&a_)[4], u64 columns) {
  if constexpr (kTiles == 8 && kIsBf16<T>) COLUMNS_OF(64, "bf16", 32, "{%32, %33, %34, %35}", "%36");
  if constexpr (kTiles == 8 && !kIsBf16<T>) COLUMNS_OF(64, "f16", 32, "{%32, %33, %34, %35}", "%36");
  if constexpr (kTiles == 16 && kIsBf16<T>) COLUMNS_OF(128, "bf16", 64, "{%64, %65, %66, %67}", "%68");
  if constexpr (kTiles == 16 && !kIsBf16<T>) COLUMNS_OF(128, "f16", 64, "{%64, %65, %66, %67}", "%68");
}
#undef ROWS
#undef COLUMNS_OF

}  // namespace tinyllm
