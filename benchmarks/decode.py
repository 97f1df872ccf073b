"""Decoding and prefill at batch 1: our INT8 beside other engines with the same weights.

    python benchmarks/decode.py [--shapes 0 1 2] [--threads 1 2] [--rounds 5]

Random weights of three Llama shapes. Engines take turns: each reads a prompt of 128 tokens, then
makes 64 tokens greedily, timed one by one; samples in which the process lost its core are dropped,
medians of the rest count. Engines that are not installed are named. "bandwidth" reads as many bytes
as the INT8 weights have, by torch, in turns with the rest; `read_share` is the bytes that our token
has to read, weights and cache, per second over that.

Before that every engine reads the prompt, its last tokens one by one, and its logits are compared
with those of fp32: "off" is the root mean square of the difference over the logits' own spread
(8-bit weights: 3 to 7 %; a model that is put together wrongly: above 80 %), "top 1" how many of
the likeliest tokens are the same. The last line is one JSON object. `--quick` ends within 50 s.
"""

import os

# Peers wait as they do by default: passive OpenMP makes llama.cpp 8 times slower on 2 threads.
os.environ.pop("OMP_WAIT_POLICY", None)

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import Engine, against_fp32, build_engines, config_of

from tinyllm.inference.cache import KVCache
from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelConfig
from tinyllm.ops.cpu import Arena

SHAPES = (  # d, layers, heads, vocabulary, feed-forward
    (256, 6, 8, 8192, 704),
    (768, 12, 12, 16384, 2048),
    (1024, 24, 16, 32768, 2752),
)
PROMPT, NEW = 128, 64
CHECKED = 16
REST_S = 0.02
"""Between engines: threads of the one before stop spinning within a few ms."""
OURS, BANDWIDTH = "ours INT8", "bandwidth"
Results = dict[str, dict[str, float]]


class Samples:
    """Seconds by what was measured; a disturbed sample counts only where there is no other."""

    def __init__(self) -> None:
        self._clean: dict[str, list[float]] = defaultdict(list)
        self._all: dict[str, list[float]] = defaultdict(list)

    def time(self, name: str, run: Callable[[], Any]) -> Any:
        """Run once; return what it returns."""
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        started_s = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - started_s
        self._all[name].append(seconds)
        if resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == switches:
            self._clean[name].append(seconds)
        return result

    def median(self, name: str) -> float:
        """Return the median of the clean samples, in seconds."""
        return statistics.median(self._clean[name] or self._all[name])


def weight_bytes(config: ModelConfig) -> int:
    """Return the bytes of INT8 weights that a token reads."""
    attention = 2 * config.d_head * (config.n_heads + config.n_kv_heads) * config.d
    return config.n_layers * (attention + 3 * config.d * config.d_ff) + config.d * config.vocab_size


def one_round(engines: dict[str, Engine], prompt: list[int], new: int, samples: Samples) -> None:
    """Let each engine read the prompt and write."""
    for name, engine in engines.items():
        time.sleep(REST_S)
        engine.clear()
        engine.read(prompt[:1])  # wakes its threads
        engine.clear()
        logits = samples.time(f"{name} prefill", partial(engine.read, prompt))
        for _ in range(new):
            token = int(np.argmax(logits))
            logits = samples.time(f"{name} decode", partial(engine.read, [token]))


def measure(
    config: ModelConfig, threads: list[int], rounds: int, new: int
) -> tuple[Results, list[str]]:
    """Return figures by thread count or "logits", and the engines that are not installed.

    For each thread count: tokens per second by engine and kind, and bytes per second.
    """
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, PROMPT).tolist()
    model = build_model(config, seed=0).eval().requires_grad_(False)
    expected_TV = model(torch.tensor([prompt]))[0, -CHECKED:].numpy()
    results: Results = {}
    with tempfile.TemporaryDirectory() as folder:
        found = build_engines(model, Path(folder))
        engines = {name: engine for name, engine in found.items() if engine is not None}
        for engine in engines.values():
            engine.set_threads(threads[0])
        logits = {name: against_fp32(e, prompt, expected_TV) for name, e in engines.items()}
        results["logits"] = {f"{n} {k}": x for n, row in logits.items() for k, x in row.items()}
        words = Arena(weight_bytes(config)).take(weight_bytes(config) // 8 * 8).view(torch.int64)
        words.fill_(1)
        for n in threads:
            for engine in engines.values():
                engine.set_threads(n)
            one_round(engines, prompt, 2, Samples())  # the first pass prepares the weights
            samples = Samples()
            for _ in range(rounds):
                one_round(engines, prompt, new, samples)
                for _ in range(10):
                    samples.time(BANDWIDTH, lambda: torch.sum(words))
            row = {BANDWIDTH: words.nbytes / samples.median(BANDWIDTH)}
            for name in engines:
                row[f"{name} decode"] = 1 / samples.median(f"{name} decode")
                row[f"{name} prefill"] = PROMPT / samples.median(f"{name} prefill")
            results[f"threads_{n}"] = row
    return results, [name for name, engine in found.items() if engine is None]


def ratios(config: ModelConfig, row: dict[str, float]) -> dict[str, float]:
    """Return ours over each peer, and the share of the bandwidth."""
    found = {}
    for kind in ("decode", "prefill"):
        for name, speed in row.items():
            engine = name.removesuffix(f" {kind}")
            if name.endswith(kind) and engine != OURS:
                found[f"{kind} / {engine}"] = row[f"{OURS} {kind}"] / speed
    cached = KVCache.n_bytes(config, 1, PROMPT + NEW // 2, torch.bfloat16)
    read = weight_bytes(config) + cached
    found["read_share"] = row[f"{OURS} decode"] * read / row[BANDWIDTH]
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=NEW, help="made in each round")
    parser.add_argument("--quick", action="store_true", help="two shapes, two rounds, 16 tokens")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.rounds, options.tokens = [0, 1], 2, 16
    summary: dict[str, Any] = {}
    for index in options.shapes:
        config = config_of(*SHAPES[index])
        print(f"\nd {config.d}  layers {config.n_layers}  vocabulary {config.vocab_size}")
        results, missing = measure(config, options.threads, options.rounds, options.tokens)
        logits = results.pop("logits")
        shape = summary[f"d{config.d}"] = {t: ratios(config, row) for t, row in results.items()}
        shape["logits"] = {name: round(value, 4) for name, value in logits.items()}
        for name in engine_names(logits):
            off, same = logits[f"{name} off"], logits[f"{name} top_1"]
            print(f"  {name:32}off {off:7.1%}    top 1 {same:4.0%}")
        for threads, row in results.items():
            print(f"  {threads}: read {row[BANDWIDTH] / 1e9:.1f} GB/s")
            for name in engine_names(row):
                decode, prefill = row[f"{name} decode"], row[f"{name} prefill"]
                print(f"    {name:30}decode {decode:9.0f} tok/s    prefill {prefill:9.0f} tok/s")
        if missing:
            print(f"  not installed: {', '.join(missing)}")
    print(json.dumps(summary))


def engine_names(row: dict[str, float]) -> list[str]:
    """Return the engines in a row of figures, each once."""
    return list(dict.fromkeys(name.rsplit(" ", 1)[0] for name in row if name != BANDWIDTH))


if __name__ == "__main__":
    main()
