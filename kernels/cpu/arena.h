// Parts of one piece of memory, each from a cache line on. Everything is static: see w8a8.h.
#pragma once
#include <cstdint>

namespace tinyllm {
namespace {

[[gnu::always_inline]] inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Hands out one part after the other; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;  // bytes

  template <class T>
  T* take(int64_t n) {
    auto* part = reinterpret_cast<T*>(base + used);
    used += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
};

}  // namespace
}  // namespace tinyllm
