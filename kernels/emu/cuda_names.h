// CUDA's own names for the emulator: types, indices, barriers, shuffles, atomics, arithmetic.
#pragma once
#include <cmath>

#include "emu.h"

#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

#define threadIdx (emu::self().index)
#define blockIdx (emu::m.block_index)
#define blockDim (emu::m.block)
#define gridDim (emu::m.grid)
#define EMU_SITE {name, __builtin_FILE(), __builtin_LINE()}
#define __syncthreads() emu::block_barrier({"__syncthreads", __FILE__, __LINE__})
#define EMU_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace emu {

inline void check_mask(unsigned mask, const char* name) {
  if (mask != ~0u) fail("%s: the emulator knows the full mask only", name);
}

template <class T>
struct Shuffle {
  T in, out;
  int from;
};

template <class T>
T exchange(T value, int from, unsigned mask, const Site& site) {
  check_mask(mask, site.name);
  Shuffle<T> mine{value, value, from};
  meet(site, &mine, [](void* const all[kLanes]) {
    for (int i = 0; i < kLanes; i++) {
      auto* s = static_cast<Shuffle<T>*>(all[i]);
      s->out = static_cast<Shuffle<T>*>(all[s->from])->in;
    }
  });
  return mine.out;
}

struct Vote {
  bool in;
  unsigned out;
};

inline unsigned vote(bool in, unsigned mask, const Site& site) {
  check_mask(mask, site.name);
  Vote mine{in, 0};
  meet(site, &mine, [](void* const all[kLanes]) {
    unsigned bits = 0;
    for (int i = 0; i < kLanes; i++) bits |= unsigned{static_cast<Vote*>(all[i])->in} << i;
    for (int i = 0; i < kLanes; i++) static_cast<Vote*>(all[i])->out = bits;
  });
  return mine.out;
}

}  // namespace emu

inline void __syncwarp(unsigned mask = ~0u, EMU_CALLER) {
  emu::check_mask(mask, "__syncwarp");
  emu::meet({"__syncwarp", file, line}, nullptr, [](void* const*) {});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int = 32, EMU_CALLER) {
  return emu::exchange(v, emu::lane() ^ bits, mask, {"__shfl_xor_sync", file, line});
}
template <class T>
T __shfl_sync(unsigned mask, T v, int from, int = 32, EMU_CALLER) {
  return emu::exchange(v, from & 31, mask, {"__shfl_sync", file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int by, int = 32, EMU_CALLER) {
  const int from = emu::lane() + by;
  return emu::exchange(v, from < 32 ? from : emu::lane(), mask, {"__shfl_down_sync", file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int by, int = 32, EMU_CALLER) {
  const int from = emu::lane() - by;
  return emu::exchange(v, from >= 0 ? from : emu::lane(), mask, {"__shfl_up_sync", file, line});
}
inline unsigned __ballot_sync(unsigned mask, bool v, EMU_CALLER) {
  return emu::vote(v, mask, {"__ballot_sync", file, line});
}
inline bool __any_sync(unsigned mask, bool v, EMU_CALLER) {
  return emu::vote(v, mask, {"__any_sync", file, line}) != 0;
}
inline bool __all_sync(unsigned mask, bool v, EMU_CALLER) {
  return emu::vote(v, mask, {"__all_sync", file, line}) == ~0u;
}

template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}

inline unsigned __float_as_uint(float x) {
  unsigned u;
  memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
inline int __float2int_rn(float x) { return static_cast<int>(lrintf(x)); }  // half to even
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned from) {
  const unsigned long long bytes = low | static_cast<unsigned long long>(high) << 32;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) out |= static_cast<unsigned>(bytes >> (from >> 4 * i & 7) * 8 & 255) << 8 * i;
  return out;
}
template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }
