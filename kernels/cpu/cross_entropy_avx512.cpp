// Cross-entropy with AVX-512. See cross_entropy.h.
#include "cross_entropy_row.h"

namespace tinyllm {
const CrossEntropyRow kCrossEntropyAvx512[2] = {cross_entropy_row<Fp32<16, 4>, float>,
                                                cross_entropy_row<Fp32<16, 4>, uint16_t>};
}
