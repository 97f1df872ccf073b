// Attention with AVX512-BF16: vdpbf16ps multiplies and adds pairs of bf16. See flash.h.
#include "flash_table.h"

namespace tinyllm {
const FlashIsa kFlashBf16 = kFlashEntry<Bf16, uint16_t>;
}
