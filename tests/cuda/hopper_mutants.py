"""Faults for attention's kernel for Hopper, one at a time: each must be noticed."""

from mutants import Mutant

FORWARD, TILES = "attention_forward_hopper.cu", "hopper.h"

QUICK = [
    Mutant("no swizzle told", TILES, "u64{1} << 62", "u64{0} << 62"),
    Mutant("groups of 4 rows", TILES, "kGroupBytes = 8 * kRowBytes", "kGroupBytes = 4 * kRowBytes"),
    Mutant("no barrier after making barriers", FORWARD, "  __syncthreads();\n", ""),
    Mutant(
        "no wait for values",
        FORWARD,
        "    mbarrier_wait(&shared.v_full[stage_of(n)], parity_of(n));\n",
        "",
    ),
    Mutant(
        "values fetched into a stage in use",
        FORWARD,
        "      mbarrier_wait(&shared.v_empty[stage], before);\n",
        "",
    ),
    Mutant(
        "no fence before the products",
        FORWARD,
        "    wgmma_fence();\n    multiply_keys",
        "    multiply_keys",
    ),
    Mutant(
        "values are given back too early",
        FORWARD,
        "    wgmma_wait<0>(o[0]);\n    release(&shared.v_empty[stage_of(n)]);\n",
        "    release(&shared.v_empty[stage_of(n)]);\n    wgmma_wait<0>(o[0]);\n",
    ),
    Mutant(
        "a query sees the next",
        FORWARD,
        "return k <= query &&",
        "return k <= query + 1 &&",
    ),
]
WIDE = [  # only heads wider than a tile have a second one
    Mutant("queries' second tile elsewhere", FORWARD, "q + tile * kRows + column", "q + column"),
    Mutant(
        "values' tiles too close", FORWARD, "kColumns * kRowBytes)", "kColumns * kRowBytes / 2)"
    ),
    Mutant("the second box over the first", FORWARD, "tile + column * kRows", "tile"),
]
MORE = [
    *WIDE,
    Mutant("a swizzle of 64 bytes", TILES, "u64{1} << 62", "u64{2} << 62"),
    Mutant("an address in bytes", TILES, "0x3ffff) >> 4", "0x3ffff)"),
    Mutant("no step along the row", FORWARD, "k + tile * kColumns + column", "k + tile * kColumns"),
    Mutant("no step along the keys", FORWARD, "v + key * kTileWidth", "v"),
    Mutant("warpgroups share queries", FORWARD, "warp / 4 * kGroupRows * kTileWidth", "0"),
    Mutant("scores are not begun anew", FORWARD, "depth > 0);", "true);"),
    Mutant("a pair of weights exchanged", FORWARD, "(pair[0], pair[1])", "(pair[1], pair[0])"),
    Mutant("barriers not shown to the copies", FORWARD, "    fence_proxy_async();\n", ""),
    Mutant("no wait for queries", FORWARD, "  mbarrier_wait(&shared.q_full, 0);\n", ""),
    Mutant(
        "no wait for keys",
        FORWARD,
        "    mbarrier_wait(&shared.k_full[stage_of(n)], parity_of(n));\n",
        "",
    ),
    Mutant(
        "keys fetched into a stage in use",
        FORWARD,
        "      mbarrier_wait(&shared.k_empty[stage], before);\n",
        "",
    ),
    Mutant("the other phase", FORWARD, "n / kStages & 1; }", "n / kStages + 1 & 1; }"),
    Mutant("one phase for ever", FORWARD, "return n / kStages & 1;", "return 0;"),
    Mutant(
        "one warp releases for all",
        FORWARD,
        "[i], kConsumers), mbarrier_init",
        "[i], 1), mbarrier_init",
    ),
    Mutant("too few bytes expected", FORWARD, "kRows * kWidth * sizeof(Number)", "kRows * kWidth"),
    Mutant(
        "scores are read too early",
        FORWARD,
        "    wgmma_wait<1>(s[0]);\n    release",
        "    wgmma_wait<2>(s[0]);\n    release",
    ),
    Mutant(
        "the last products are not waited for",
        FORWARD,
        "  start_values(n);\n  wgmma_wait<0>(o[0]);",
        "  start_values(n);",
    ),
    Mutant("the result is not rescaled", FORWARD, "    rescale(o, shrink);\n", ""),
    Mutant("documents off by a row", FORWARD, "queries[lane / 4 + 8]}", "queries[lane / 4 + 7]}"),
    Mutant("documents off by a column", FORWARD, "lane % 4 * 2 + e % 2])", "lane % 4 * 2])"),
    Mutant(
        "a wrong group of heads",
        FORWARD,
        "head / (p.n_heads / p.n_kv_heads)",
        "head % p.n_kv_heads",
    ),
    Mutant(
        "the window begins a block late", FORWARD, "max(first - p.window + 1, 0)", "max(first, 0)"
    ),
]
