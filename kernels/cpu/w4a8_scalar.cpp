// Portable C++: the twin that the other instruction sets are compared with.
#include <cstring>

#include "w4a8.h"

namespace tinyllm {

void tile_w4_scalar(const int8_t* q, int64_t q_stride, const float* x_scale, int64_t rows,
                    const Weight& w, int64_t first, float* y, int64_t y_stride) {
  const int64_t steps = (w.k + kGroup - 1) / kGroup;
  const int64_t end = first + kPanel < w.n ? first + kPanel : w.n;
  const int64_t line = panel_pairs(w.n, first) * kBlockBytes;
  const auto* panel = reinterpret_cast<const uint8_t*>(w.packed) + first / kPairLanes * pair_bytes(w.k);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = first; j < end; ++j) {
      const int64_t pair = (j - first) / kPairLanes, high = (j - first) / kLanes % 2;
      const uint8_t* at = panel + pair * kBlockBytes + (j - first) % kLanes * kGroup;
      float total = 0.0f;
      for (int64_t step = 0; step < steps;) {
        uint16_t half;
        std::memcpy(&half, at + 2 * high, sizeof half);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float scale;
        std::memcpy(&scale, &bits, sizeof scale);
        at += line;
        int32_t sum = 0;
        const int64_t stop = step + kSteps < steps ? step + kSteps : steps;
        for (; step < stop; ++step, at += line)
          for (int64_t c = 0; c < kGroup; ++c)
            sum += q[i * q_stride + step * kGroup + c] * ((at[c] >> (4 * high) & 0xf) - kZero);
        total += static_cast<float>(sum) * scale;
      }
      y[i * y_stride + j - first] = total * x_scale[i];
    }
  }
}

}  // namespace tinyllm
