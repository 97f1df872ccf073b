// Softmax cross-entropy of rows of logits with its gradient; kernels/cpu/cross_entropy.h on a card.
//
//   loss = ln sum_j exp(x_j) - x_target     d loss / d x_j = exp(x_j) / sum - [j = target]
//
// Bishop 2006, eq. 4.109. A row is held in a block's registers: read once, and its gradient written once.
// tinyllm/model/loss.py calls it for a chunk of positions at a time, so the logits are never whole.
#include "rows.h"

namespace tinyllm {

using Logits = Vector<FORMAT>;
constexpr int kSize = Logits::kSize;

struct CrossEntropy {
  const FORMAT* logits;  // [rows][n]
  const i64* targets;    // [rows], negative: the row does not count; n or more: its loss is NaN
  float* loss;           // [rows]
  FORMAT* gradient;      // [rows][n]
  i64 rows;
  i32 n;
};

KERNEL(cross_entropy, CrossEntropy, p, 1024) {
  SHARED(float, shared);
  const i64 row = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;  // as in rms_norm.cu
  const i64 target = p.targets[row];
  Logits held[kHeld];
  float top = -kInfinity;
  for_each_held<FORMAT>(p.n, [&](int i, int at) {
    held[i] = load_16(p.logits + row * p.n + at);
#pragma unroll
    for (int e = 0; e < kSize; e++) top = fmaxf(top, to_float(held[i].at[e]));
  });
  top = row_max(top, shared);
  float sum = 0;
  for_each_held<FORMAT>(p.n, [&](int i, int) {
#pragma unroll
    for (int e = 0; e < kSize; e++) sum += exp_for<FORMAT>(to_float(held[i].at[e]) - top);
  });
  sum = row_sum(sum, shared);
  const float inverse = target < 0 ? 0.0f : 1.0f / sum;
  if (threadIdx.x == 0) {
    float loss = 0;
    if (target >= p.n) loss = __uint_as_float(0x7fffffffu);
    else if (target >= 0) loss = logf(sum) + (top - to_float(p.logits[row * p.n + target]));
    p.loss[row] = loss;
  }
  for_each_held<FORMAT>(p.n, [&](int i, int at) {  // powers are computed again: 32 of them would not fit
    Logits gradient;
#pragma unroll
    for (int e = 0; e < kSize; e++) {
      const float share = exp_for<FORMAT>(to_float(held[i].at[e]) - top) * inverse;
      gradient.at[e] = from_float<FORMAT>(at + e == target ? share - 1.0f : share);
    }
    store_16(p.gradient + row * p.n + at, gradient);
  });
}

}  // namespace tinyllm
