"""Decoding with 4-bit and with INT8 weights, the same random model, in turns.

    python benchmarks/weight_bits.py [--shapes 0 1 2] [--threads 1 2] [--rounds 5]

Shapes and timing as in decode.py. The last line is one JSON object: bytes, tokens per second and
the ratio of 4 bits to 8. `--quick` ends within 50 s.
"""

import argparse
import json

import numpy as np
import torch
from decode import NEW, PROMPT, SHAPES, Samples, one_round
from engines import Engine, Ours, config_of

from tinyllm.model.init import build_model
from tinyllm.ops.cpu import bits_of, packed_bytes
from tinyllm.quantization.int8 import quantize_model
from tinyllm.quantization.layers import QuantizedLinear

BITS = (8, 4)


def packed_size(model: torch.nn.Module) -> int:
    """Return the bytes of packed weights that a token reads."""
    layers = [x for x in model.modules() if isinstance(x, QuantizedLinear)]
    sizes = [(*x.weight_q.shape, bits_of(x.weight_q)) for x in layers]
    return sum(packed_bytes(n, columns * 8 // bits, bits) for n, columns, bits in sizes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shapes", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two shapes, two rounds, 16 tokens")
    options = parser.parse_args()
    new = 16 if options.quick else NEW
    shapes, rounds = ([0, 1], 2) if options.quick else (options.shapes, options.rounds)
    summary: dict[str, dict[str, float]] = {}
    for index in shapes:
        config = config_of(*SHAPES[index])
        model = build_model(config, seed=0).eval().requires_grad_(False)
        models = {f"{bits} bits": quantize_model(model, weight_bits=bits) for bits in BITS}
        engines: dict[str, Engine] = {name: Ours(each) for name, each in models.items()}
        prompt = np.random.default_rng(0).integers(0, config.vocab_size, PROMPT).tolist()
        one_round(engines, prompt, 2, Samples())  # the first pass packs the weights
        row = {f"{name} bytes": float(packed_size(each)) for name, each in models.items()}
        for n in options.threads:
            samples = Samples()
            torch.set_num_threads(n)
            for _ in range(rounds):
                one_round(engines, prompt, new, samples)
            for kind, tokens in (("decode", 1), ("prefill", PROMPT)):
                speeds = {name: tokens / samples.median(f"{name} {kind}") for name in engines}
                row |= {f"{name} {kind}, {n} threads": speed for name, speed in speeds.items()}
                row[f"{kind} ratio, {n} threads"] = speeds["4 bits"] / speeds["8 bits"]
        print(f"\nd {config.d}  layers {config.n_layers}  vocabulary {config.vocab_size}")
        for name, value in row.items():
            print(f"  {name:28}{value:14,.2f}")
        summary[f"d{config.d}"] = {name: round(value, 3) for name, value in row.items()}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
