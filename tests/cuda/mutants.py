"""Faults to put into the CUDA kernels, one at a time: each must be noticed, a test of the tests."""

from dataclasses import dataclass

FORWARD, QUERIES, KEYS = (
    f"attention_{name}.cu" for name in ("forward", "backward_queries", "backward_keys")
)

SOFTMAX = "attention_softmax.h"


@dataclass(frozen=True)
class Mutant:
    fault: str
    file: str
    old: str
    new: str


ATTENTION = [
    *(
        fault
        for file in (FORWARD, QUERIES, KEYS)
        for fault in (
            Mutant(
                "no barrier before the next block is fetched",
                file,
                "    cp_async_wait<0>();\n    __syncthreads();",
                "    cp_async_wait<0>();",
            ),
            Mutant(
                "no wait for the copies",
                file,
                "    cp_async_wait<0>();\n    __syncthreads();",
                "    cp_async_wait<1>();\n    __syncthreads();",
            ),
            Mutant("the half in use is overwritten", file, "(next, half ^ 1)", "(next, half)"),
            Mutant(
                "a wrong group of heads",
                file,
                "const int n_shared = p.n_heads / p.n_kv_heads;",
                "const int n_shared = 1;",
            )
            if file == KEYS
            else Mutant(
                "a wrong group of heads",
                file,
                "head / (p.n_heads / p.n_kv_heads)",
                "head % p.n_kv_heads",
            ),
        )
    ),
    Mutant(
        "no shuffle of the largest",
        SOFTMAX,
        "best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, 2));",
        "",
    ),
    Mutant(
        "no shuffle of the sum",
        SOFTMAX,
        "sum[i][half] += __shfl_xor_sync(kAllLanes, sum[i][half], 1);",
        "",
    ),
    Mutant(
        "the result is not rescaled",
        SOFTMAX,
        "o[i][j][e] *= shrink[i][e / 2];",
        ";",
    ),
    Mutant("the sum is not rescaled", SOFTMAX, "sum[i][half] *= shrink[i][half];", ""),
    Mutant(
        "no scale",
        FORWARD,
        "softmax.update(s, shrink, p.scale * kLog2E)",
        "softmax.update(s, shrink, kLog2E)",
    ),
    Mutant(
        "log-sum-exp of base 2",
        SOFTMAX,
        "log2_fast(sum[i][half]) * kLn2",
        "log2_fast(sum[i][half])",
    ),
    Mutant("no scale of dQ", QUERIES, "factor[i / 2][i % 2] = p.scale", "factor[i / 2][i % 2] = 1"),
    Mutant("no shuffle of delta", QUERIES, "sum += __shfl_xor_sync(kAllLanes, sum, 2);", ""),
    Mutant("no delta", QUERIES, "(d_p[i][j][e] - delta[i][e / 2])", "d_p[i][j][e]"),
    Mutant(
        "no barrier behind dO", QUERIES, "  __syncthreads();\n\n  float delta", "\n  float delta"
    ),
    Mutant("no scale of dK", KEYS, "factor[i / 2][i % 2] = p.scale", "factor[i / 2][i % 2] = 1"),
    Mutant(
        "delta of a neighbour",
        KEYS,
        "delta[8 * j + lane % 4 * 2 + e % 2]",
        "delta[8 * j + lane % 4 * 2]",
    ),
    Mutant("half the heads of a group", KEYS, "(group + 1) * n_shared;", "group * n_shared + 1;"),
    Mutant(
        "a query does not see itself",
        "attention.h",
        "return key <= query &&",
        "return key < query &&",
    ),
    Mutant(
        "a query sees the next",
        "attention.h",
        "return key <= query &&",
        "return key <= query + 1 &&",
    ),
    Mutant(
        "blocks on the diagonal are whole",
        "attention.h",
        "key + n_keys - 1 > query)",
        "key + n_keys / 2 > query)",
    ),
    Mutant(
        "a window one wider", "attention.h", "query - key < p.window)", "query - key <= p.window)"
    ),
    Mutant(
        "blocks on the window's edge are whole",
        "attention.h",
        "n_queries - 1 - key >= p.window",
        "n_queries / 2 - key >= p.window",
    ),
    Mutant(
        "documents see each other",
        "attention.h",
        "documents()[query] == documents()[key]",
        "documents()[query] >= documents()[key]",
    ),
    Mutant(
        "mixed blocks count as one document",
        "attention.h",
        "return low == high && key_low == key_high && low == key_low;",
        "return low == key_low;",
    ),
    Mutant(
        "touching documents count as apart",
        "attention.h",
        "low > key_high ||",
        "low >= key_high ||",
    ),
    Mutant(
        "writing without the swizzle",
        "attention_mma.h",
        "cp_async_16(tile + place<kWidth>(r, c)",
        "cp_async_16(tile + r * kWidth + c * 8",
    ),
    Mutant(
        "no swizzle at all",
        "attention_mma.h",
        "(chunk ^ (row >> (3 - kBits) & ((1 << kBits) - 1)))",
        "chunk",
    ),
    Mutant(
        "a swizzle by the wrong bits", "attention_mma.h", "row >> (3 - kBits)", "row >> (4 - kBits)"
    ),
    Mutant(
        "reading past the sequence",
        "attention_mma.h",
        "const bool is_real = row + r < n_tokens;",
        "const bool is_real = row + r <= n_tokens;",
    ),
    Mutant(
        "matrices of B exchanged",
        "attention_mma.h",
        "(16 * j + lane / 16 * 8) * kDepth + place<kDepth>(lane % 8, depth ^ lane / 8 % 2)",
        "(16 * j + lane / 8 % 2 * 8) * kDepth + place<kDepth>(lane % 8, depth ^ lane / 16)",
    ),
    Mutant(
        "a pair of weights exchanged",
        "attention_mma.h",
        "pack<Number>(pair[0], pair[1])",
        "pack<Number>(pair[1], pair[0])",
    ),
    Mutant(
        "a row past the end is stored",
        "attention.h",
        "if (r >= n_tokens) continue;",
        "if (r > n_tokens) continue;",
    ),
]
