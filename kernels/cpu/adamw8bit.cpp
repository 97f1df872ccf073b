// The C interface of adamw8bit.h and the step for any processor. Portable flags.
#include "adamw8bit.h"

#include <omp.h>

#include <algorithm>

#include "adamw8bit_blocks.h"

namespace tinyllm {
namespace {

constexpr int64_t kBlocksPerTask = 64;  // 64 KB of parameters

void look_up(const float* table, const uint8_t* index, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = table[index[i]];
}

}  // namespace

void adamw8bit_portable(const AdamW8bit& s, int64_t first, int64_t last) { step_blocks<look_up>(s, first, last); }

}  // namespace tinyllm

using namespace tinyllm;

int tinyllm_adamw8bit(const AdamW8bit* problem, int64_t isa, int64_t threads) {
  const AdamW8bit& s = *problem;
  if (s.n < 0 || threads < 1) return -1;
  const int64_t blocks = (s.n + kStateBlock - 1) / kStateBlock;
  const int64_t tasks = (blocks + kBlocksPerTask - 1) / kBlocksPerTask;
  const int used = static_cast<int>(std::max<int64_t>(1, std::min(threads, tasks)));
  const auto step = isa >= 2 ? adamw8bit_avx512 : adamw8bit_portable;
#pragma omp parallel for schedule(static) num_threads(used)
  for (int64_t task = 0; task < tasks; ++task)
    step(s, task * kBlocksPerTask, std::min(blocks, (task + 1) * kBlocksPerTask));
  return 0;
}
