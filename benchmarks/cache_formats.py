"""An INT8 model's tokens over long caches, kept in fp32, bf16 and INT8.

    python benchmarks/cache_formats.py [--contexts 512 2048 8192] [--threads 1] [--rounds 60]

Random weights of decode.py's middle shape with a small vocabulary, caches full of random numbers.
Formats take turns, token by token, so that a busy moment hits all of them; samples in which the
process lost its core are dropped, medians of the rest count. The last line is one JSON object.
`--quick` ends within 50 s.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a spinning thread stalls a busy machine

import argparse
import json
from dataclasses import replace
from functools import partial

import torch
from decode import SHAPES, Samples
from engines import config_of

from tinyllm.inference.cache import KVCache
from tinyllm.inference.generate import CACHES
from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelConfig
from tinyllm.model.transformer import Transformer
from tinyllm.quantization.int8 import quantize_model

VOCAB_SIZE = 1024


def full_cache(config: ModelConfig, name: str, context: int) -> KVCache:
    """Return a cache with `context` random positions and room for one more."""
    cache = KVCache(config, 1, context + 1, CACHES[name], "cpu")
    for part in (part for layer in cache.memory() for part in layer):
        part[:, :, :context] = torch.randn(1, *config.cached[:1], context, config.d_head)
    cache.reserve(context)
    return cache


@torch.inference_mode()
def measure(model: Transformer, context: int, rounds: int) -> dict[str, float]:
    """Return the milliseconds of a token by the format of the cache."""
    caches = {name: full_cache(model.config, name, context) for name in CACHES}
    token, samples = torch.tensor([[7]]), Samples()
    for i in range(rounds + 3):
        for name, cache in caches.items():
            samples.time(name if i >= 3 else "warm-up", partial(model.next_logits, token, cache))
            cache.truncate(context)
    return {name: 1e3 * samples.median(name) for name in caches}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="20 rounds, 4 blocks")
    options = parser.parse_args()
    d, n_layers, n_heads, _, d_ff = SHAPES[1]
    if options.quick:
        options.rounds, n_layers = 20, 4
    torch.set_num_threads(options.threads)
    config = config_of(d, n_layers, n_heads, VOCAB_SIZE, d_ff)
    config = replace(config, max_seq_len=max(options.contexts) + 1)
    model = quantize_model(build_model(config, seed=0).eval())
    print(f"d = {d}, {n_layers} blocks, {options.threads} threads; ms per token, MB of cache\n")
    print("| context | " + " | ".join(f"{n} ms | MB" for n in CACHES) + " | bf16 / int8 |")
    print("|---" * (2 * len(CACHES) + 2) + "|")
    ratios = {}
    for context in options.contexts:
        ms = measure(model, context, options.rounds)
        ratios[str(context)] = round(ms["bf16"] / ms["int8"], 3)
        cells = [
            f"{ms[n]:.2f} | {KVCache.n_bytes(config, 1, context, CACHES[n]) / 1e6:.1f}"
            for n in CACHES
        ]
        print(f"| {context} | {' | '.join(cells)} | {ratios[str(context)]:.2f} |", flush=True)
    print(json.dumps({"bf16_over_int8_ms": ratios}))


if __name__ == "__main__":
    main()
