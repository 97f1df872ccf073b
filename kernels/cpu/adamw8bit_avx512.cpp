// The step of adamw8bit.h, vectors of 16.
#include "adamw8bit_blocks.h"

namespace tinyllm {
void adamw8bit_avx512(const AdamW8bit& s, int64_t first, int64_t last) { step_blocks(s, first, last); }
}  // namespace tinyllm
