// Attention with AVX2: 16 registers hold a tile of 6 x 16 sums. See flash.h.
#include "flash_table.h"

namespace tinyllm {
const FlashIsa kFlashAvx2[2] = {kFlashEntry<Fp32<8, 2>, float>, kFlashEntry<Fp32<8, 2>, uint16_t>};
}
