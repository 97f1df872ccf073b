// Vectors put together from lanes of others; included by every instruction set. Everything is static: see w8a8.h.
#pragma once

namespace tinyllm {
namespace {

// Lane i is the one that places[i] names: first those of a, then those of b. The places are constants.
template <class Vector, class Places>
[[gnu::always_inline]] inline Vector shuffle(Vector a, Vector b, Places places) {
#ifdef __clang__  // has another builtin, and makes one instruction of this
  constexpr int kCount = sizeof(Vector) / sizeof(a[0]);
  Vector all;
#pragma clang loop unroll(full)
  for (int i = 0; i < kCount; ++i) all[i] = places[i] < kCount ? a[places[i]] : b[places[i] - kCount];
  return all;
#else
  return __builtin_shuffle(a, b, places);
#endif
}

}  // namespace
}  // namespace tinyllm
