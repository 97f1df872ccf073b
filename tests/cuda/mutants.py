"""Faults to put into the CUDA kernels, one at a time: each must be noticed, a test of the tests."""

from dataclasses import dataclass

FORWARD, QUERIES, KEYS = (
    f"attention_{name}.cu" for name in ("forward", "backward_queries", "backward_keys")
)


@dataclass(frozen=True)
class Mutant:
    fault: str
    file: str
    old: str
    new: str


def of(file, *faults):
    """Return mutants of a file from (fault, old text, new text)."""
    return [Mutant(fault, file, old, new) for fault, old, new in faults]


ATTENTION = [
    *(
        mutant
        for file in (FORWARD, QUERIES, KEYS)
        for mutant in of(
            file,
            (
                "no barrier before the next block is fetched",
                "    cp_async_wait<0>();\n    __syncthreads();",
                "    cp_async_wait<0>();",
            ),
            (
                "no wait for the copies",
                "    cp_async_wait<0>();\n    __syncthreads();",
                "    cp_async_wait<1>();\n    __syncthreads();",
            ),
            ("the half in use is overwritten", "(next, half ^ 1)", "(next, half)"),
        )
    )
]
ATTENTION += of(
    "attention_softmax.h",
    ("no shuffle of the largest", "best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, 2));", ""),
    ("no shuffle of the sum", "sum[i][half] += __shfl_xor_sync(kAllLanes, sum[i][half], 1);", ""),
    ("the result is not rescaled", "o[i][j][e] *= shrink[i][e / 2];", ";"),
    ("the sum is not rescaled", "sum[i][half] *= shrink[i][half];", ""),
    ("log-sum-exp of base 2", "log2_fast(sum[i][half]) * kLn2", "log2_fast(sum[i][half])"),
)
ATTENTION += of(
    FORWARD,
    ("a wrong group of heads", "head / (p.n_heads / p.n_kv_heads)", "head % p.n_kv_heads"),
    (
        "no scale",
        "softmax.update(s, shrink, p.scale * kLog2E)",
        "softmax.update(s, shrink, kLog2E)",
    ),
)
ATTENTION += of(
    QUERIES,
    ("a wrong group of heads", "head / (p.n_heads / p.n_kv_heads)", "head % p.n_kv_heads"),
    ("no scale of dQ", "(d_q, p.scale,", "(d_q, 1,"),
    ("no shuffle of delta", "sum += __shfl_xor_sync(kAllLanes, sum, 2);", ""),
    ("no delta", "(d_p[i][j][e] - delta[i][e / 2])", "d_p[i][j][e]"),
    ("no barrier behind dO", "  __syncthreads();\n\n  float delta", "\n  float delta"),
)
ATTENTION += of(
    KEYS,
    (
        "a wrong group of heads",
        "const int n_shared = p.n_heads / p.n_kv_heads;",
        "const int n_shared = 1;",
    ),
    ("no scale of dK", "(d_k, p.scale,", "(d_k, 1,"),
    ("delta of a neighbour", "delta[8 * j + lane % 4 * 2 + e % 2]", "delta[8 * j + lane % 4 * 2]"),
    ("half the heads of a group", "(group + 1) * n_shared;", "group * n_shared + 1;"),
)
ATTENTION += of(
    "attention.h",
    ("a query does not see itself", "return key <= query &&", "return key < query &&"),
    ("a query sees the next", "return key <= query &&", "return key <= query + 1 &&"),
    ("blocks on the diagonal are whole", "key + n_keys - 1 > query)", "key + n_keys / 2 > query)"),
    ("a window one wider", "query - key < p.window)", "query - key <= p.window)"),
    (
        "blocks on the window's edge are whole",
        "n_queries - 1 - key >= p.window",
        "n_queries / 2 - key >= p.window",
    ),
    (
        "documents see each other",
        "documents()[query] == documents()[key]",
        "documents()[query] >= documents()[key]",
    ),
    (
        "mixed blocks count as one document",
        "return low == high && key_low == key_high && low == key_low;",
        "return low == key_low;",
    ),
    ("touching documents count as apart", "low > key_high ||", "low >= key_high ||"),
    ("a row past the end is stored", "if (r >= n_tokens) continue;", "if (r > n_tokens) continue;"),
)
ATTENTION += of(
    "attention_mma.h",
    (
        "writing without the swizzle",
        "cp_async_16(tile + place<kWidth>(r, c)",
        "cp_async_16(tile + r * kWidth + c * 8",
    ),
    ("no swizzle at all", "(chunk ^ (row >> (3 - kBits) & ((1 << kBits) - 1)))", "chunk"),
    ("a swizzle by the wrong bits", "row >> (3 - kBits)", "row >> (4 - kBits)"),
    (
        "reading past the sequence",
        "const bool is_real = row + r < n_tokens;",
        "const bool is_real = row + r <= n_tokens;",
    ),
    (
        "matrices of B exchanged",
        "(16 * j + lane / 16 * 8) * kDepth + place<kDepth>(lane % 8, depth ^ lane / 8 % 2)",
        "(16 * j + lane / 8 % 2 * 8) * kDepth + place<kDepth>(lane % 8, depth ^ lane / 16)",
    ),
    (
        "a pair of weights exchanged",
        "pack<Number>(pair[0], pair[1])",
        "pack<Number>(pair[1], pair[0])",
    ),
)
