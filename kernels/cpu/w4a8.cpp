// Packing of w4a8.h. Portable flags.
#include "w4a8.h"

#include <algorithm>
#include <cstring>

using namespace tinyllm;

int tinyllm_pack_w4(const uint8_t* w, const uint16_t* scale, int64_t n, int64_t k, int8_t* packed) {
  if (n < 1 || k < 2 || k % 2 != 0 || k > kMaxK) return -1;
  const int64_t steps = (k + kGroup - 1) / kGroup, scales = (k + kScaled - 1) / kScaled;
  auto* line = reinterpret_cast<uint8_t*>(packed);
  for (int64_t first = 0; first < n; first += kPanel) {
    const int64_t pairs = panel_pairs(n, first);
    for (int64_t g = 0; g < scales; ++g) {
      for (int64_t pair = 0; pair < pairs; ++pair, line += kBlockBytes)
        for (int64_t lane = 0; lane < kPairLanes; ++lane) {
          const int64_t row = first + pair * kPairLanes + lane;
          const uint16_t value = row < n ? scale[row * scales + g] : 0;
          std::memcpy(line + lane % kLanes * 4 + lane / kLanes * 2, &value, sizeof value);
        }
      for (int64_t step = g * kSteps; step < std::min(steps, (g + 1) * kSteps); ++step)
        for (int64_t pair = 0; pair < pairs; ++pair, line += kBlockBytes) {
          std::memset(line, kZero << 4 | kZero, kBlockBytes);
          for (int64_t lane = 0; lane < kPairLanes; ++lane)
            for (int64_t c = 0; c < kGroup; ++c) {
              const int64_t row = first + pair * kPairLanes + lane, i = step * kGroup + c;
              if (row >= n || i >= k) continue;
              const int number = w[(row * k + i) / 2] >> (i % 2 * 4) & 0xf;
              uint8_t& byte = line[lane % kLanes * kGroup + c];
              byte = lane < kLanes ? (byte & 0xf0) | number : (byte & 0x0f) | number << 4;
            }
        }
    }
  }
  return 0;
}
