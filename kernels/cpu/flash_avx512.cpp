// Attention with AVX-512: 32 registers hold a tile of 6 x 64 sums. See flash.h.
#include "flash_table.h"

namespace tinyllm {
const FlashIsa kFlashAvx512[2] = {kFlashEntry<Fp32<16, 4>, float>,
                                  kFlashEntry<Fp32<16, 4>, uint16_t>};
}
