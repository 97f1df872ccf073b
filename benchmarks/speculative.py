"""Speculative decoding on a model directory: acceptance and speed of each kind of draft.

    python benchmarks/speculative.py [MODEL_DIR] [--tokens 128] [--threads 2] [--n-draft 4]

Every round makes the same texts without a draft and with each one, in turns; the last line is one
JSON object. `equal` says whether all greedy texts were the same.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a spinning thread stalls a busy machine

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tinyllm.inference.drafts import Draft, LookupDraft, ModelDraft, first_layers
from tinyllm.inference.generate import generate
from tinyllm.inference.sampling import SamplingParams
from tinyllm.inference.session import Session, open_session
from tinyllm.inference.speculative import SpeculationStats, speculate
from tinyllm.quantization.int8 import quantize_model
from tinyllm.quantization.load import load_any_model

PROMPTS = (
    "MACBETH. Is this a dagger which I see before me,",
    "To be, or not to be, that is the question. To be, or not",
    "Enter the King and all his lords.\n\nKING. ",
)
ROUNDS = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", nargs="?", type=Path, default=Path("data/models/lora"))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n-draft", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    session = open_session(options.model_dir, load_any_model, torch.device("cpu"))
    results = {}
    for temperature in (0.0, 0.8):
        sampling = SamplingParams(temperature=temperature, max_new_tokens=options.tokens)
        results[f"temperature {temperature}"] = measure(session, sampling, options.n_draft)
    print(f"{'':18}{'draft':10}{'accepted':>10}{'tokens/pass':>13}{'speed-up':>10}{'equal':>8}")
    for setting, drafts in results.items():
        for name, row in drafts.items():
            print(
                f"{setting:18}{name:10}{row['acceptance']:10.2f}{row['tokens_per_pass']:13.2f}"
                f"{row['speedup']:10.2f}{row['equal']!s:>8}"
            )
    print(json.dumps(results))


def make_drafts(session: Session, sampling: SamplingParams) -> dict[str, Callable[[], Draft]]:
    """Return what makes a fresh draft of each kind."""
    model = session.model
    half = first_layers(model, model.config.n_layers // 2)
    drafts: dict[str, Callable[[], Draft]] = {
        "lookup": LookupDraft,
        "layers": lambda: ModelDraft(half, sampling),
    }
    if not session.is_quantized:
        int8 = quantize_model(model)
        drafts["int8"] = lambda: ModelDraft(int8, sampling)
    return drafts


def measure(session: Session, sampling: SamplingParams, n_draft: int) -> dict[str, dict[str, Any]]:
    """Return acceptance, tokens per pass, speed-up and equality of each draft."""
    drafts = make_drafts(session, sampling)
    prompts = [session.tokenizer.encode(text) for text in PROMPTS]
    speedups: dict[str, list[float]] = {name: [] for name in drafts}
    stats = {name: SpeculationStats() for name in drafts}
    equal = dict.fromkeys(drafts, True)
    for round_number in range(ROUNDS + 1):  # the first one warms up
        started_s = time.perf_counter()
        plain = [list(generate(session.model, ids, sampling, ())) for ids in prompts]
        plain_s = time.perf_counter() - started_s
        for name, make in drafts.items():
            started_s = time.perf_counter()
            texts = [
                speculate(session.model, ids, sampling, (), make(), n_draft=n_draft)
                for ids in prompts
            ]
            made = [list(text) for text in texts]
            if round_number:
                speedups[name].append(plain_s / (time.perf_counter() - started_s))
                equal[name] &= made == plain
                for text in texts:
                    add(stats[name], text.stats)
    return {
        name: {
            "acceptance": round(stats[name].acceptance, 3),
            "tokens_per_pass": round(stats[name].tokens_per_pass, 2),
            "speedup": round(statistics.median(speedups[name]), 2),
            "equal": equal[name] if sampling.temperature == 0 else None,
        }
        for name in drafts
    }


def add(total: SpeculationStats, one: SpeculationStats) -> None:
    """Add the counts of one text."""
    total.n_rounds += one.n_rounds
    total.n_proposed += one.n_proposed
    total.n_accepted += one.n_accepted
    total.n_plain += one.n_plain


if __name__ == "__main__":
    main()
