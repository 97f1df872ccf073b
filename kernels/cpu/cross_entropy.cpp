// The C interface of cross_entropy.h: the choice of instruction set, threads, scratch. Portable flags.
#include "cross_entropy.h"

#include <omp.h>

#include <algorithm>

#include "scratch.h"

using namespace tinyllm;

int tinyllm_cross_entropy(const CrossEntropy* problem, int64_t threads) {
  const CrossEntropy& p = *problem;
  if (p.isa < 1 || p.isa > 3 || p.rows < 0 || p.n < 1 || threads < 1) return -1;
  if (std::any_of(p.targets, p.targets + p.rows, [&](int64_t target) { return target >= p.n; }))
    return -1;
  const CrossEntropyRow one_row =
      (p.isa >= 2 ? kCrossEntropyAvx512 : kCrossEntropyAvx2)[p.is_bf16 ? 1 : 0];
  const auto bytes = static_cast<size_t>((p.n + 15) / 16 * 16) * sizeof(float);
  bool short_of_memory = false;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
  for (int64_t row = 0; row < p.rows; ++row) {
    thread_local Scratch scratch;
    auto* memory = static_cast<float*>(scratch.reserve(bytes));
    if (memory == nullptr) {
#pragma omp atomic write
      short_of_memory = true;
    } else {
      one_row(p, row, memory);
    }
  }
  return short_of_memory ? -2 : 0;
}
