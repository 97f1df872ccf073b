"""Faults for attention's kernel for Hopper, one at a time: each must be noticed."""

from mutants import of

FORWARD, TILES = "attention_forward_hopper.cu", "hopper.h"

QUICK = of(
    TILES,
    ("no swizzle told", "u64{1} << 62", "u64{0} << 62"),
    ("groups of 4 rows", "kGroupBytes = 8 * kRowBytes", "kGroupBytes = 4 * kRowBytes"),
) + of(
    FORWARD,
    ("no barrier after making barriers", "  __syncthreads();\n", ""),
    ("no wait for values", "    mbarrier_wait(&shared.v_full[stage_of(n)], parity_of(n));\n", ""),
    (
        "values fetched into a stage in use",
        "      mbarrier_wait(&shared.v_empty[stage], before);\n",
        "",
    ),
    ("no fence before the products", "    wgmma_fence();\n    multiply_keys", "    multiply_keys"),
    (
        "values are given back too early",
        "    wgmma_wait<0>(o[0]);\n    release(&shared.v_empty[stage_of(n)]);\n",
        "    release(&shared.v_empty[stage_of(n)]);\n    wgmma_wait<0>(o[0]);\n",
    ),
    ("a query sees the next", "return k <= query &&", "return k <= query + 1 &&"),
)
# Only heads wider than a tile have a second one.
WIDE = of(
    FORWARD,
    ("queries' second tile elsewhere", "q + tile * kRows + column", "q + column"),
    ("values' tiles too close", "kColumns * kRowBytes)", "kColumns * kRowBytes / 2)"),
    ("the second box over the first", "tile + column * kRows", "tile"),
)
MORE = (
    WIDE
    + of(
        TILES,
        ("a swizzle of 64 bytes", "u64{1} << 62", "u64{2} << 62"),
        ("an address in bytes", "0x3ffff) >> 4", "0x3ffff)"),
    )
    + of(
        FORWARD,
        ("no step along the row", "k + tile * kColumns + column", "k + tile * kColumns"),
        ("no step along the keys", "v + key * kTileWidth", "v"),
        ("warpgroups share queries", "warp / 4 * kGroupRows * kTileWidth", "0"),
        ("scores are not begun anew", "depth > 0);", "true);"),
        ("a pair of weights exchanged", "(pair[0], pair[1])", "(pair[1], pair[0])"),
        ("barriers not shown to the copies", "    fence_proxy_async();\n", ""),
        ("no wait for queries", "  mbarrier_wait(&shared.q_full, 0);\n", ""),
        ("no wait for keys", "    mbarrier_wait(&shared.k_full[stage_of(n)], parity_of(n));\n", ""),
        (
            "keys fetched into a stage in use",
            "      mbarrier_wait(&shared.k_empty[stage], before);\n",
            "",
        ),
        ("the other phase", "n / kStages & 1; }", "n / kStages + 1 & 1; }"),
        ("one phase for ever", "return n / kStages & 1;", "return 0;"),
        ("one warp releases for all", "[i], kConsumers), mbarrier_init", "[i], 1), mbarrier_init"),
        ("too few bytes expected", "kRows * kWidth * sizeof(Number)", "kRows * kWidth"),
        (
            "scores are read too early",
            "    wgmma_wait<1>(s[0]);\n    release",
            "    wgmma_wait<2>(s[0]);\n    release",
        ),
        (
            "the last products are not waited for",
            "  start_values(n);\n  wgmma_wait<0>(o[0]);",
            "  start_values(n);",
        ),
        ("the result is not rescaled", "    rescale(o, shrink);\n", ""),
        ("documents off by a row", "queries[lane / 4 + 8]}", "queries[lane / 4 + 7]}"),
        ("documents off by a column", "lane % 4 * 2 + e % 2])", "lane % 4 * 2])"),
        ("a wrong group of heads", "head / (p.n_heads / p.n_kv_heads)", "head % p.n_kv_heads"),
        ("the window begins a block late", "max(first - p.window + 1, 0)", "max(first, 0)"),
    )
)
