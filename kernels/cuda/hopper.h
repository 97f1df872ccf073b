// Tiles as Hopper's copy engine writes them and its tensor cores read them: the swizzle of 128 bytes.
//
// A tile is rows of 64 16-bit numbers, 128 bytes each; a wider head has several tiles behind each other. The
// 16-byte chunk c of row r lies at chunk c ^ r % 8: bits 4-6 of an address are XORed with its bits 7-9, so a tile
// begins at a multiple of 1024 bytes. It is `place<64>` of attention_mma.h, done by the hardware.
#pragma once
#ifdef TINYLLM_EMU
#include "../emu/hopper_instructions.h"
#else
#include "hopper_instructions.h"
#endif

namespace tinyllm {

constexpr int kTileWidth = 64, kRowBytes = 128, kGroupBytes = 8 * kRowBytes;  // 8 rows: the pattern's period

// How wgmma finds a matrix: 64 bits, addresses and distances in units of 16 bytes (PTX ISA, "matrix descriptor").
//   0-13 first byte    16-29 leading distance    32-45 stride    49-51 base offset, 0    62-63 swizzle, 1: 128 bytes
// `next_tile`: from a tile to the next 64 columns, where columns are what is multiplied out; else unused.
__device__ __forceinline__ u64 descriptor(const void* first, int next_tile) {
  return (shared_address(first) & 0x3ffff) >> 4 | static_cast<u64>(next_tile >> 4) << 16 |
         static_cast<u64>(kGroupBytes >> 4) << 32 | u64{1} << 62;
}

}  // namespace tinyllm

#ifndef TINYLLM_EMU
#define SHARED_TILES(type, name)                                    \
  extern __shared__ __align__(1024) unsigned char tinyllm_tiles[]; \
  type& name = *reinterpret_cast<type*>(tinyllm_tiles)
#endif
