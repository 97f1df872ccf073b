// Cross-entropy with AVX2. See cross_entropy.h.
#include "cross_entropy_row.h"

namespace tinyllm {
const CrossEntropyRow kCrossEntropyAvx2[2] = {cross_entropy_row<Fp32<8, 2>, float>,
                                              cross_entropy_row<Fp32<8, 2>, uint16_t>};
}
