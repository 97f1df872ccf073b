"""Kinds of attention at equal width: parameters, cached bytes per token, decoding speed.

    python benchmarks/attention_kinds.py [--d 512] [--layers 6] [--context 1024] [--threads 1]

MHA, GQA (half the heads), MQA and MLA with the sizes that follow from the width; MLA decodes
absorbed (the latents themselves are attended to) and naive (every cached latent is expanded to
keys and values of all heads, each step). All caches are filled with `--context` random positions;
candidates take turns, token by token, so that a busy moment hits all of them; fp32, one sequence.
The last line is one JSON object. `--quick` ends within 50 s.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a spinning thread stalls a busy machine

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tinyllm.inference.cache import KVCache
from tinyllm.model.init import build_model, count_parameters
from tinyllm.model.mla import LatentAttention
from tinyllm.model.sizes import ModelParams, resolve
from tinyllm.model.transformer import Transformer
from tinyllm.params import build_params, read_yaml

PARAMS = Path(__file__).parent.parent / "params.yaml"
VOCAB_SIZE = 1024
KINDS = ("MHA", "GQA", "MQA", "MLA absorbed", "MLA naive")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model with a full cache."""

    model: Transformer
    cache: KVCache


def build(kind: str, d: int, n_layers: int, context: int) -> Candidate:
    """Return a random model of a kind with `context` positions in its cache."""
    n_heads = max(2, d // 64)
    n_kv_heads = {"MHA": n_heads, "GQA": n_heads // 2, "MQA": 1}.get(kind, n_heads)
    changes: dict[str, int | str] = {"d": d, "n_layers": n_layers, "n_heads": n_heads}
    changes |= {"n_kv_heads": n_kv_heads, "max_seq_len": context + 1}
    changes |= {"attention": "mla" if "MLA" in kind else "gqa"}
    document = {**read_yaml(PARAMS)["model"], **changes}
    config = resolve(build_params(ModelParams, document, str(PARAMS)), VOCAB_SIZE)
    model = build_model(config, seed=0).eval()
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module.absorbs = kind == "MLA absorbed"
    cache = KVCache(config, 1, context + 1, torch.float32, "cpu")
    heads, d_k, d_v = config.cached
    for layer in cache.layers:
        layer.append(torch.randn(1, heads, context, d_k), torch.randn(1, heads, context, d_v))
    return Candidate(model, cache)


def decode_ms(candidate: Candidate, context: int) -> float:
    """Return the milliseconds of one token after `context` others; the cache stays as it was."""
    started_s = time.perf_counter()
    candidate.model(torch.tensor([[7]]), cache=candidate.cache)
    elapsed_s = time.perf_counter() - started_s
    candidate.cache.truncate(context)
    return 1e3 * elapsed_s


def measure(d: int, n_layers: int, context: int, tokens: int) -> dict[str, dict[str, float]]:
    """Return the table by kind; speed from the median of `tokens` tokens each."""
    candidates = {kind: build(kind, d, n_layers, context) for kind in KINDS}
    samples: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with torch.inference_mode():
        for i in range(tokens + 3):
            for kind, candidate in candidates.items():
                sample = decode_ms(candidate, context)
                if i >= 3:  # the first ones warm up
                    samples[kind].append(sample)
    return {
        kind: {
            "parameters": count_parameters(candidate.model),
            "cached_bytes_per_token": KVCache.n_bytes(candidate.model.config, 1, 1, torch.float32),
            "decode_tokens_per_s": 1e3 / statistics.median(samples[kind]),
        }
        for kind, candidate in candidates.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=60, help="measured per kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="20 tokens, 4 layers")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.layers = 20, 4
    torch.set_num_threads(options.threads)
    rows = measure(options.d, options.layers, options.context, options.tokens)
    mha, absorbed, naive = (rows[kind] for kind in ("MHA", "MLA absorbed", "MLA naive"))
    print(
        f"d = {options.d}, {options.layers} blocks, context {options.context}, fp32,"
        f" {options.threads} threads, median of {options.tokens} tokens\n"
    )
    print(f"| {'attention':12} | parameters | cached bytes per token | of MHA | decode tokens/s |")
    print("|---|---|---|---|---|")
    for kind, row in rows.items():
        share = row["cached_bytes_per_token"] / mha["cached_bytes_per_token"]
        print(
            f"| {kind:12} | {row['parameters']:,} | {row['cached_bytes_per_token']:,}"
            f" | {share:.3f} | {row['decode_tokens_per_s']:.1f} |"
        )
    speed = "decode_tokens_per_s"
    summary = {
        "mla_cache_of_mha": absorbed["cached_bytes_per_token"] / mha["cached_bytes_per_token"],
        "mla_absorbed_over_naive_speed": absorbed[speed] / naive[speed],
        "mla_absorbed_over_mha_speed": absorbed[speed] / mha[speed],
        "kinds": rows,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
