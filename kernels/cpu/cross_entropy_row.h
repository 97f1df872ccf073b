// One row of cross_entropy.h; included by each instruction set. See w8a8.h on static functions.
#pragma once
#include "arena.h"
#include "cross_entropy.h"
#include "simd.h"

namespace tinyllm {
namespace {

template <class S, class In>
void cross_entropy_row(const CrossEntropy& problem, int64_t row, float* scratch) {
  using Vec = typename S::Vec;
  const int64_t n = problem.n, target = problem.targets[row];
  const In* logits = static_cast<const In*>(problem.logits) + row * n;
  In* gradient = static_cast<In*>(problem.gradient) + row * n;
  if (target < 0) {
    __builtin_memset(gradient, 0, static_cast<size_t>(n) * sizeof(In));
    problem.loss[row] = 0;
    return;
  }
  const int64_t padded = round_up(n, S::kLanes);
  for (int64_t j = 0; j < n; ++j) scratch[j] = widen(logits[j]);
  for (int64_t j = n; j < padded; ++j) scratch[j] = -__builtin_inff();
  Vec largest = load<S>(scratch);
  for (int64_t j = S::kLanes; j < padded; j += S::kLanes)
    largest = larger<S>(largest, load<S>(scratch + j));
  const float top = largest_lane<S>(largest);
  Vec sums = {};
  for (int64_t j = 0; j < padded; j += S::kLanes) {
    const Vec power = exp2_lanes<S>((load<S>(scratch + j) - top) * kLog2E);
    store<S>(scratch + j, power);
    sums += power;
  }
  const float sum = sum_lanes<S>(sums), inverse = 1.0f / sum;
  problem.loss[row] = __builtin_logf(sum) + (top - widen(logits[target]));
  for (int64_t j = 0; j < n; ++j) narrow(scratch[j] * inverse, gradient + j);
  narrow(scratch[target] * inverse - 1.0f, gradient + target);
}

}  // namespace
}  // namespace tinyllm
