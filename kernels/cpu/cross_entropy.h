// Softmax cross-entropy of rows of logits with its gradient, called from tinyllm/ops/cross_entropy.py.
//
//   loss = ln sum_j exp(x_j) - x_target     d loss / d x_j = exp(x_j) / sum - [j = target]
//
// Bishop 2006, eq. 4.109. A row is widened to fp32, exponentiated once and divided while it is in the
// first cache: logits are read once and the gradient is written once.
#pragma once
#include <cstdint>

namespace tinyllm {

struct CrossEntropy {
  const void* logits;      // [rows][n], bf16 or fp32
  const int64_t* targets;  // [rows], below n; negative: the row does not count
  float* loss;             // [rows], 0 where the row does not count
  void* gradient;          // [rows][n], the format of the logits
  int64_t rows, n;
  int64_t is_bf16;
  int64_t isa;             // index in the table of instruction sets, see w8a8.h
};

// One row; `scratch` has room for n numbers, rounded up to a multiple of 16.
using CrossEntropyRow = void (*)(const CrossEntropy& problem, int64_t row, float* scratch);

extern const CrossEntropyRow kCrossEntropyAvx2[2];    // [0] fp32 logits, [1] bf16 logits
extern const CrossEntropyRow kCrossEntropyAvx512[2];  // likewise

}  // namespace tinyllm

// Returns 0, -1 where an argument is impossible, -2 without memory.
extern "C" int tinyllm_cross_entropy(const tinyllm::CrossEntropy* problem, int64_t threads);
