// What every kernel includes: one language for the card (nvcc, NVRTC) and for the emulator (g++ with
// TINYLLM_EMU). No host headers: NVRTC has none. The names of CUDA itself (threadIdx, __syncthreads,
// __shfl_xor_sync, atomicAdd, min, fmaxf ...) mean the same in both worlds; instructions.h has the rest.
//
//   struct Arguments { const bf16* x; float* y; i64 n; };
//   KERNEL(twice, Arguments, p, 256) { ... }     // p is const; at most 256 threads per block
//
// Shared memory is asked for at launch and named by SHARED(float, tile): one region per kernel.
#pragma once

namespace tinyllm {
using i8 = signed char;
using u8 = unsigned char;
using i32 = int;
using u32 = unsigned;
using i64 = long long;
using u64 = unsigned long long;
}  // namespace tinyllm

#ifdef TINYLLM_EMU
#include "../emu/instructions.h"
#else
#include "instructions.h"
#endif

namespace tinyllm {

constexpr int kLanes = 32;
constexpr u32 kAllLanes = ~0u;
constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);

// 16 bytes of numbers, moved at once.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// p is a multiple of 16, in global or shared memory.
template <class T>
__device__ __forceinline__ Vector<T> load_16(const T* p) {
  const uint4 bits = load_bits(p);
  Vector<T> v;
  memcpy(&v, &bits, 16);
  return v;
}
template <class T>
__device__ __forceinline__ void store_16(T* p, const Vector<T>& v) {
  uint4 bits;
  memcpy(&bits, &v, 16);
  store_bits(p, bits);
}

// Over all 32 lanes, the result in each of them; every lane must call.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, bits));
  return x;
}

}  // namespace tinyllm
