// INT8 weights as both kernels of linear layers want them; drawn in kernels/LAYOUT.md.
//
// A panel has 32 outputs, a tile 32 outputs x 32 inputs: 1024 bytes, two fragments of 512. A lane's
// 16 bytes of a fragment are its registers of an mma operand with 16 rows and 32 columns:
//   word w, byte b of lane l: row l / 4 + 8 (w % 2), input 16 (w / 2) + 4 (l % 4) + b
// As W8A8's second operand (columns are outputs) the same words are two tiles of 8 outputs.
// Row r of fragment f is output 8 (r % 8 / 2) + 4 f + 2 (r / 8) + r % 2 of its panel: so a lane's sums
// in W8A8, two neighbours of each of four tiles of 8, are of eight neighbouring outputs.
#pragma once
#include "device.h"

namespace tinyllm {

constexpr int kPanel = 32, kTile = 32;
constexpr int kFragment = 512, kTileBytes = 2 * kFragment;

struct Int8Weight {
  const i8* packed;    // [panels][tiles][2][32 lanes][16], zeros where padded
  const float* scale;  // [panels][32], zeros where padded
  i32 outputs, inputs;
  i32 panels, tiles;   // tiles is even
};

// Four signed bytes as two pairs of 16-bit floats, exactly. Conversion instructions are slow (16 per
// clock on sm_86 where there are 64 of these), so a byte becomes the low bits of a float whose
// numbers are 1 apart, and what was added by that is subtracted.
template <class T>
__device__ __forceinline__ void widen_bytes(u32 bytes, u32& first, u32& second);
template <>
__device__ __forceinline__ void widen_bytes<bf16>(u32 bytes, u32& first, u32& second) {
  // 0x4300 is 128 and has 7 bits to spare: 128 + the lower 7 bits, less 128, or 256 if negative.
  const u32 a = __byte_perm(bytes, 0x43434343u, 0x4140), b = __byte_perm(bytes, 0x43434343u, 0x4342);
  first = subtract_pairs<bf16>(a & 0xff7fff7fu, a & 0xff80ff80u);
  second = subtract_pairs<bf16>(b & 0xff7fff7fu, b & 0xff80ff80u);
}
template <>
__device__ __forceinline__ void widen_bytes<half>(u32 bytes, u32& first, u32& second) {
  const u32 shifted = bytes ^ 0x80808080u;  // plus 128; 0x6400 is 1024 and has 10 bits to spare
  const u32 offset = 0x64806480u;           // 1024 + 128
  first = subtract_pairs<half>(__byte_perm(shifted, 0x64646464u, 0x4140), offset);
  second = subtract_pairs<half>(__byte_perm(shifted, 0x64646464u, 0x4342), offset);
}

}  // namespace tinyllm
