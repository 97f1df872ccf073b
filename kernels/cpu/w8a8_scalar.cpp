// Portable C++: the twin that the other instruction sets are compared with.
#include <cmath>

#include "attend_rows.h"
#include "quantize.h"
#include "w4a8.h"

namespace tinyllm {
namespace {

float quantize(const float* x, int64_t k, int8_t* q, uint8_t flip) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < k; ++i) {
    const uint32_t bits = magnitude(x + i);
    largest = bits > largest ? bits : largest;
  }
  float inverse;
  const float scale = row_scale(largest, k, q, flip, &inverse);
  if (inverse == 0.0f) return scale;
  for (int64_t i = 0; i < k; ++i) {
    const auto rounded = static_cast<int32_t>(std::nearbyintf(x[i] * inverse));  // half to even
    const int32_t clamped = rounded > 127 ? 127 : rounded < -127 ? -127 : rounded;
    q[i] = static_cast<int8_t>(static_cast<uint8_t>(clamped) ^ flip);
  }
  return scale;
}

void tile(const int8_t* q, int64_t q_stride, const float* x_scale, int64_t rows, const Weight& w,
          int64_t first, float* y, int64_t y_stride) {
  const int64_t groups = (w.k + kGroup - 1) / kGroup;
  const int64_t end = first + kPanel < w.n ? first + kPanel : w.n;
  const int64_t step = panel_blocks(w.n, first) * kBlockBytes;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = first; j < end; ++j) {
      const int8_t* lane = w.packed + first * groups * kGroup + (j - first) * kGroup;
      int32_t sum = 0;
      for (int64_t group = 0; group < groups; ++group)
        for (int64_t c = 0; c < kGroup; ++c)
          sum += q[i * q_stride + group * kGroup + c] * lane[group * step + c];
      y[i * y_stride + j - first] = static_cast<float>(sum) * x_scale[i] * w.scale[j];
    }
  }
}

}  // namespace

const Isa kScalar = {quantize, tile, tile_w4_scalar, 0, rms_norm, add,
                     rotate, attend, open_head, attend_rows, narrow, gate};

}  // namespace tinyllm
