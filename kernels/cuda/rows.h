// Rows of numbers that are read once, held in registers and looked at more than once.
//
// blockDim.x threads share a row, blockDim.y rows share a block: one warp per row and several rows,
// or several warps and one row. Thread x holds the 16-byte vectors x, x + blockDim.x, ...: neighbours
// read neighbouring bytes. A row's bytes are a multiple of 16, so vectors are whole.
#pragma once
#include "device.h"

namespace tinyllm {

constexpr int kHeld = 4;  // vectors per thread, so a row has at most 64 blockDim.x bytes

// The index of the number that this thread's vector i begins with.
template <class T>
__device__ __forceinline__ int first_number(int i) {
  return (static_cast<int>(threadIdx.x) + i * static_cast<int>(blockDim.x)) * Vector<T>::kSize;
}

// Calls f(i, at) for each vector i of a row of `width` numbers that this thread holds; it begins with number `at`.
template <class T, class F>
__device__ __forceinline__ void for_each_held(int width, const F& f) {
#pragma unroll
  for (int i = 0; i < kHeld; i++) {
    const int at = first_number<T>(i);
    if (at < width) f(i, at);
  }
}

// 4 or 8 fp32 numbers, by 16 bytes at a time.
template <int kSize>
__device__ __forceinline__ void load_floats(const float* p, float (&out)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    const Vector<float> v = load_16(p + i);
#pragma unroll
    for (int e = 0; e < 4; e++) out[i + e] = v.at[e];
  }
}
template <int kSize>
__device__ __forceinline__ void store_floats(float* p, const float (&x)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    Vector<float> v;
#pragma unroll
    for (int e = 0; e < 4; e++) v.at[e] = x[i + e];
    store_16(p + i, v);
  }
}

// n numbers of a byte, moved at once; p is a multiple of n.
template <int n>
struct alignas(n) Bytes {
  i8 at[n];
};
template <int n>
__device__ __forceinline__ void store_bytes(i8* p, const Bytes<n>& b) { *reinterpret_cast<Bytes<n>*>(p) = b; }

// The magnitude's bits grow with the magnitude; those of NaN are above those of infinity.
__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ __forceinline__ u32 warp_max(u32 x) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, bits));
  return x;
}

// exp(x) for a result that is rounded to T: 16 bits do not show the 2 ulp of the fast one.
template <class T>
__device__ __forceinline__ float exp_for(float x) {
  return sizeof(T) == 4 ? expf(x) : exp2_fast(x * 1.4426950408889634f);
}

struct Add {
  __device__ __forceinline__ float operator()(float x) const { return warp_sum(x); }
};
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T x) const { return warp_max(x); }
};

// Joins one value per thread over the threads of a row, in an order that is always the same. Every
// thread of the block calls; `shared` has room for one value per warp. `none` changes no result.
template <class Join, class T>
__device__ __forceinline__ T over_row(T x, T none, T* shared) {
  x = Join()(x);
  const int n_warps = blockDim.x / kLanes;
  if (n_warps == 1) return x;
  const int lane = threadIdx.x % kLanes;
  __syncthreads();  // the values of the call before have been read
  if (lane == 0) shared[threadIdx.x / kLanes] = x;
  __syncthreads();
  return Join()(lane < n_warps ? shared[lane] : none);
}
__device__ __forceinline__ float row_sum(float x, float* shared) { return over_row<Add>(x, 0.0f, shared); }
__device__ __forceinline__ float row_max(float x, float* shared) {
  return over_row<Max>(x, -kInfinity, shared);
}
__device__ __forceinline__ u32 row_max(u32 x, u32* shared) { return over_row<Max>(x, 0u, shared); }

}  // namespace tinyllm
