// The cache of keys and values of a pass (`Tokens` of decoder.h): where a position lies, how it is written and read.
// Drawn in kernels/LAYOUT.md. Portable units only.
#pragma once
#include <cstring>

#include "decoder.h"

namespace tinyllm {
namespace {

struct KvCache {
  const Tokens& t;
  const Isa& isa;
  int64_t d_head;

  // The first number of a key-value head. Offsets count numbers, of keys and values alike.
  int64_t head_start(int64_t layer, int64_t sequence, int64_t group) const {
    return layer * t.layer_stride + sequence * t.sequence_stride + group * t.head_stride;
  }

  // Stores the numbers of a head at one position, as a key or as a value.
  void store(bool is_key, int64_t offset, const float* x) const {
    void* cache = is_key ? t.keys : t.values;
    switch (t.stored) {
      case Stored::kFloat:
        std::memcpy(static_cast<float*>(cache) + offset, x, static_cast<size_t>(d_head) * sizeof(float));
        return;
      case Stored::kBf16:
        isa.narrow(x, d_head, static_cast<uint16_t*>(cache) + offset);
        return;
      case Stored::kInt8:
        float* scale = is_key ? t.key_scale : t.value_scale;
        scale[offset / t.position_stride] = isa.quantize(x, d_head, static_cast<int8_t*>(cache) + offset, 0);
    }
  }

  // The positions [first, end) of the head that begins at `start`; whether the next head is read after it.
  CachedHead positions(int64_t start, int64_t first, int64_t end, bool has_next) const {
    const int64_t offset = start + first * t.position_stride;
    const int64_t bytes = t.stored == Stored::kFloat ? 4 : t.stored == Stored::kBf16 ? 2 : 1;
    const int64_t scales = t.stored == Stored::kInt8 ? offset / t.position_stride : 0;
    const auto* keys = static_cast<const char*>(t.keys) + offset * bytes;
    return {keys, static_cast<const char*>(t.values) + offset * bytes,
            t.key_scale + scales, t.value_scale + scales,
            has_next ? keys + t.head_stride * bytes : nullptr,
            t.position_stride, end - first, t.stored};
  }
};

}  // namespace
}  // namespace tinyllm
