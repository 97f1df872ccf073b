// What instructions.h of kernels/cuda does in PTX, done by the emulator; see there for the meaning.
// The fragments follow the figures of the PTX ISA, "Matrix Fragments for mma.m16n8k16 / m16n8k32".
#pragma once
#include "copies.h"
#include "cuda_names.h"
#include "scheduler.h"

namespace tinyllm {

struct bf16 { unsigned short bits; };
struct half { unsigned short bits; };

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(unsigned{x.bits} << 16); }
inline float to_float(half x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, e = x.bits >> 10 & 31, f = x.bits & 1023;
  if (e == 31) return __uint_as_float(sign | 0x7f800000u | f << 13);
  const float size = e ? __uint_as_float((e + 112) << 23 | f << 13) : static_cast<float>(f) * 0x1p-24f;
  return sign ? -size : size;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) {  // NaN first: poison must not become a number
  if (x != x) return {0x7fff};
  const unsigned u = __float_as_uint(x);
  return {static_cast<unsigned short>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
inline half from_float<half>(float x) {
  if (x != x) return {0x7fff};
  const unsigned short sign = __float_as_uint(x) >> 16 & 0x8000;
  const float size = fabsf(x);
  if (size >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00)};
  if (size < 0x1p-14f)  // subnormal: steps of 2^-24
    return {static_cast<unsigned short>(sign | static_cast<unsigned>(lrintf(size * 0x1p24f)))};
  const unsigned u = __float_as_uint(size);
  return {static_cast<unsigned short>(sign | (((u + 0xfff + (u >> 13 & 1)) >> 13) - (112u << 10)))};
}

template <class T>
unsigned pack(float low, float high) {
  return from_float<T>(low).bits | unsigned{from_float<T>(high).bits} << 16;
}

template <class T>
unsigned subtract_pairs(unsigned a, unsigned b) {
  const auto low = [](unsigned x) { return to_float(T{static_cast<unsigned short>(x)}); };
  return pack<T>(low(a) - low(b), low(a >> 16) - low(b >> 16));
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }

inline uint4 load_bits(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emu::fail("thread %d: load_16 from %p", emu::m.current, p);
  return *static_cast<const uint4*>(p);
}
inline void store_bits(void* p, uint4 bits) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emu::fail("thread %d: store_16 to %p", emu::m.current, p);
  *static_cast<uint4*>(p) = bits;
}
inline uint4 load_once(const void* p) { return load_bits(p); }

inline void cp_async_16(void* shared, const void* global, bool is_real) {
  emu::copy_start(shared, is_real ? global : nullptr, 16);
}
inline void cp_async_4(void* shared, const void* global, bool is_real) {
  emu::copy_start(shared, is_real ? global : nullptr, 4);
}
inline void cp_async_commit() { emu::copy_commit(); }
template <int kLeft>
void cp_async_wait() { emu::copy_wait(kLeft); }

struct RowAddress {
  const char* row;
  unsigned* out;
};

template <bool kTransposed>
void ldmatrix(unsigned (&out)[4], const void* row, const emu::Site& site) {
  emu::check_shared(row, 16, site.name);
  RowAddress mine{static_cast<const char*>(row), out};
  emu::meet(site, &mine, [](void* const all[32]) {
    for (int i = 0; i < 4; i++) {
      const char* rows[8];
      unsigned taken[8] = {}, turns = 0;
      for (int r = 0; r < 8; r++) {
        rows[r] = static_cast<RowAddress*>(all[i * 8 + r])->row;
        unsigned& n = taken[reinterpret_cast<uintptr_t>(rows[r]) / 16 % 8];
        if (++n > turns) turns = n;
      }
      emu::m.bank_conflicts += turns - 1;
      for (int l = 0; l < 32; l++) {
        const int r = l / 4, c = l % 4 * 2;
        unsigned short low, high;
        memcpy(&low, kTransposed ? rows[c] + 2 * r : rows[r] + 2 * c, 2);
        memcpy(&high, kTransposed ? rows[c + 1] + 2 * r : rows[r] + 2 * c + 2, 2);
        static_cast<RowAddress*>(all[l])->out[i] = low | unsigned{high} << 16;
      }
    }
  });
}
inline void ldmatrix_x4(unsigned (&out)[4], const void* row, EMU_CALLER) {
  ldmatrix<false>(out, row, {"ldmatrix_x4", file, line});
}
inline void ldmatrix_x4_trans(unsigned (&out)[4], const void* row, EMU_CALLER) {
  ldmatrix<true>(out, row, {"ldmatrix_x4_trans", file, line});
}

struct Fragments {
  void* d;
  const unsigned *a, *b;
};

template <class T>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], EMU_CALLER) {
  Fragments mine{d, a, b};
  emu::meet({"mma_m16n8k16", file, line}, &mine, [](void* const all[32]) {
    float left[16][16], right[16][8];
    const auto number = [](unsigned word, int i) {
      return to_float(T{static_cast<unsigned short>(i ? word >> 16 : word)});
    };
    for (int l = 0; l < 32; l++) {
      const auto* f = static_cast<Fragments*>(all[l]);
      const int row = l / 4, k = l % 4 * 2;
      for (int i = 0; i < 2; i++) {
        for (int r = 0; r < 4; r++) left[row + r % 2 * 8][k + i + r / 2 * 8] = number(f->a[r], i);
        for (int r = 0; r < 2; r++) right[k + i + r * 8][row] = number(f->b[r], i);
      }
    }
    float sums[16][8] = {};
    for (int r = 0; r < 16; r++)
      for (int k = 0; k < 16; k++)
        for (int c = 0; c < 8; c++) sums[r][c] += left[r][k] * right[k][c];
    for (int l = 0; l < 32; l++) {
      auto* out = static_cast<float*>(static_cast<Fragments*>(all[l])->d);
      for (int i = 0; i < 4; i++) out[i] += sums[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    }
  });
}

inline void mma_m16n8k32(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], EMU_CALLER) {
  Fragments mine{d, a, b};
  emu::meet({"mma_m16n8k32", file, line}, &mine, [](void* const all[32]) {
    int left[16][32], right[32][8], sums[16][8] = {};
    for (int l = 0; l < 32; l++) {
      const auto* f = static_cast<Fragments*>(all[l]);
      const int row = l / 4, k = l % 4 * 4;
      for (int i = 0; i < 4; i++) {
        const auto number = [i](unsigned word) { return static_cast<signed char>(word >> 8 * i); };
        for (int r = 0; r < 4; r++) left[row + r % 2 * 8][k + i + r / 2 * 16] = number(f->a[r]);
        for (int r = 0; r < 2; r++) right[k + i + r * 16][row] = number(f->b[r]);
      }
    }
    for (int r = 0; r < 16; r++)
      for (int k = 0; k < 32; k++)
        for (int c = 0; c < 8; c++) sums[r][c] += left[r][k] * right[k][c];
    for (int l = 0; l < 32; l++) {
      auto* out = static_cast<int*>(static_cast<Fragments*>(all[l])->d);
      for (int i = 0; i < 4; i++) out[i] += sums[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    }
  });
}

}  // namespace tinyllm

#define SHARED(type, name) type* const name = reinterpret_cast<type*>(emu::m.shared)
#define KERNEL(name, Arguments, p, max_threads)                                                        \
  static void name##_body(const Arguments& p);                                                         \
  extern "C" __attribute__((visibility("default"))) int name(                                          \
      const void* arguments, const unsigned* extents, unsigned shared_bytes, unsigned long long seed,  \
      char* message, unsigned long long message_size) {                                                \
    return emu::run([](const void* a) { name##_body(*static_cast<const Arguments*>(a)); }, max_threads, \
                    arguments, extents, shared_bytes, seed, message, message_size);                    \
  }                                                                                                    \
  static void name##_body(const Arguments& p)
