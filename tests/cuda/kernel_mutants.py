"""Faults for all kernels but attention's, as in `mutants`, by the tests that must notice them."""

from mutants import of

ROWS = of(
    "rows.h",
    (
        "values are replaced too early",
        "  __syncthreads();  // the values of the call before have been read\n",
        "",
    ),
    (
        "values are read too early",
        "  if (lane == 0) shared[threadIdx.x / kLanes] = x;\n  __syncthreads();",
        "  if (lane == 0) shared[threadIdx.x / kLanes] = x;",
    ),
    ("one warp's value is lost", "lane < n_warps ?", "lane < n_warps - 1 ?"),
)
RMS_NORM = of(
    "rms_norm.cu",
    ("no eps", "mean + p.eps", "mean"),
    ("no residual", "to_float(held[i].at[e]) + to_float(other.at[e])", "to_float(held[i].at[e])"),
    ("no mean in the gradient", "weight[e] - normed * mean", "weight[e]"),
    ("no other gradient", "p.dsum ? d + to_float(other.at[e]) : d", "d"),
    ("a slot is lost", "slot < p.slots; slot += kGroups", "slot < p.slots - 1; slot += kGroups"),
    (
        "columns are added too early",
        "  store_floats(shared + threadIdx.x * 4, sums);\n  __syncthreads();",
        "  store_floats(shared + threadIdx.x * 4, sums);",
    ),
    (
        "teams share a slot",
        "const i64 slot = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;",
        "const i64 slot = static_cast<i64>(blockIdx.x) * blockDim.y;",
    ),
)
QUANTIZE = of(
    "quantize.cu",
    (
        "rounded towards zero",
        "__float2int_rn(__fmul_rn(to_float(held[i].at[e]), inverse))",
        "static_cast<int>(__fmul_rn(to_float(held[i].at[e]), inverse))",
    ),
    ("128 steps", "__fdiv_rn(127.0f, absmax)", "__fdiv_rn(128.0f, absmax)"),
    ("no padding", "for_each_held<FORMAT>(p.stride,", "for_each_held<FORMAT>(p.width,"),
    ("tiny rows count", "finite && absmax >= kTinyAbsmax", "finite && absmax > 0"),
    ("NaN has scale 0", "finite ? 0.0f : __uint_as_float(0x7fffffffu)", "0.0f"),
    ("scale of the first row", "p.scale[first / p.width]", "p.scale[0]"),
) + of(
    "rows.h",
    ("signs count", "__float_as_uint(x) & 0x7fffffffu", "__float_as_uint(x)"),
)
W8A16 = of(
    "int8_weight.h",
    ("no sign", "subtract_pairs<bf16>(a & 0xff7fff7fu, a & 0xff80ff80u)", "a & 0xff7fff7fu"),
    ("the same pair twice", "0x43434343u, 0x4342)", "0x43434343u, 0x4140)"),
) + of(
    "linear_w8a16.cu",
    (
        "sums are read too early",
        "  __syncthreads();\n  const int row = threadIdx.x / kPanel",
        "  const int row = threadIdx.x / kPanel",
    ),
    ("no scale", "sum * p.weight.scale[output]", "sum"),
    ("columns change places", "(top, a[0], a[2])", "(top, a[2], a[0])"),
    ("rows change places", "(bottom, a[1], a[3])", "(top, a[1], a[3])"),
    ("inputs beyond the last", "row < p.rows && k < p.weight.inputs", "row < p.rows"),
    (
        "one turn again and again",
        "load_turn(next, p.weight, weights, first + kWarps * kTurn)",
        "load_turn(next, p.weight, weights, first)",
    ),
    (
        "outputs in the order of rows",
        "8 * (g / 2) + 4 * f + 2 * (i / 2) + g % 2",
        "16 * f + 8 * (i / 2) + g",
    ),
)
W8A8 = of(
    "linear_w8a8.cu",
    ("no barrier", "    __syncthreads();  // this stage is there for all", "    // this stage"),
    ("no wait for copies", "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();"),
    (
        "a stage too close",
        "next % kStages * kStageBytes, next",
        "step % kStages * kStageBytes, next",
    ),
    ("rows are stored unswizzled", "stage + feed.to + i", "stage + threadIdx.x * 16 + i"),
    ("no swizzle", "(column ^ (row / 2 % 4))", "column"),
    ("the wrong words", "{w.at[0], w.at[2]}", "{w.at[0], w.at[1]}"),
    ("the same inputs twice", "half_step * 2 + lane / 16", "half_step * 2"),
    ("a neighbour's scale", "(product, scales[i])", "(product, scales[i ^ 1])"),
    ("scales in another order", "const float scale = p.scale[row];", "const float scale = 1;"),
    ("rows below change places", "below * 2 + i % 2", "(1 - below) * 2 + i % 2"),
)
DECODE = of(
    "decode_attention.cu",
    (
        "scores are read too early",
        "n_heads, queries, scores);\n  __syncthreads();",
        "n_heads, queries, scores);",
    ),
    (
        "weights are read too early",
        "gridDim.x + blockIdx.x) * 2);\n  __syncthreads();",
        "gridDim.x + blockIdx.x) * 2);",
    ),
    (
        "sums are read too early",
        "n_heads, scores, joined);\n  __syncthreads();",
        "n_heads, scores, joined);",
    ),
    ("one key too many", "p.chunk, length) - first}", "p.chunk, length + 1) - first}"),
    (
        "a window one wider",
        "length - p.window : 0;\n  const int first = max",
        "length - p.window - 1 : 0;\n  const int first = max",
    ),
    ("a lane's part is lost", "bits = kParts / 2; bits;", "bits = kParts / 2; bits > 1;"),
    ("some keys are lost", "bits < kLanes; bits *= 2", "bits < kLanes / 2; bits *= 2"),
    ("chunks are not rescaled", "exp2_fast(stats[2 * i] - top)", "1.0f"),
    ("chunks before the window", "const int first = begin / p.chunk", "const int first = 0"),
    ("a wrong group of heads", "group * shared_by + tile", "group + tile"),
    ("no scale", "to_float(p.q[head * WIDTH + i]) * p.scale", "to_float(p.q[head * WIDTH + i])"),
)
DECODE_INT8 = of(
    "decode_attention.cu",
    ("no scale of keys", "k_scale ? sums[i] * k_scale[keys.first + index] : sums[i]", "sums[i]"),
    ("no scale of values", "v_scale ? weight * v_scale[keys.first + i] : weight", "weight"),
    ("scales from the start", "v_scale[keys.first + i]", "v_scale[i]"),
)
POINTWISE = of(
    "pointwise.cu",
    ("turned the wrong way", "two * cos[e] + one * s", "two * cos[e] - one * s"),
    ("positions go on", "(token % p.table_rows)", "(token)"),
    ("tokens without a gap", "token * p.q_stride", "token * p.heads * p.width"),
    ("a wrong derivative", "(1.0f + g * (1.0f - s))", "(1.0f + g * s)"),
    (
        "rows without a gap",
        "p.gate + row * p.stride + first);\n  const Numbers up = load_16(p.up "
        "+ row * p.stride + first);\n  Numbers y;",
        "p.gate + row * p.width + first);\n  const Numbers"
        " up = load_16(p.up + row * p.stride + first);\n  Numbers y;",
    ),
)
CROSS_ENTROPY = of(
    "cross_entropy.cu",
    ("the thread's own largest", "top = row_max(top, shared);", ""),
    ("the thread's own sum", "sum = row_sum(sum, shared);", ""),
    ("no target", "at + e == target ? share - 1.0f : share", "share"),
    ("rows that do not count", "target < 0 ? 0.0f : 1.0f / sum", "1.0f / sum"),
)
ADAMW = of(
    "adamw8bit.cu",
    ("tables are read too early", "  __syncthreads();\n  const Tables&", "  const Tables&"),
    ("half way goes up", "(x > t.middle[kind][first] ? 1 : 0)", "(x >= t.middle[kind][first])"),
    (
        "a merged multiplication",
        "__fadd_rn(__fmul_rn(p.at[e], s.decay), -__fmul_rn(update, s.rate))",
        "fmaf(p.at[e], s.decay, -__fmul_rn(update, s.rate))",
    ),
    ("negative numbers as positive", "x < 0 ? lines.zero - 1 - count :", ""),
    ("a decade is lost", "int d = 1; d < kDecades", "int d = 1; d < kDecades - 1"),
    ("numbers beyond the last", "if (first + j * 128 + e < n) most", "most"),
    (
        "half a block's scale",
        "j < kQuads; j++)\n#pragma unroll\n    for (int e = 0; e < 4; e++)\n      if",
        "j < 1; j++)\n#pragma unroll\n    for (int e = 0; e < 4; e++)\n      if",
    ),
)
