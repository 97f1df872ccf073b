"""How soon a character of Shakespeare costs how many nats: ours, and nanoGPT's CPU recipe.

    python benchmarks/time_to_loss.py --text tinyshakespeare.txt [--nanogpt DIR] [--recipe NAME ...]

The text is cut as nanoGPT cuts it: the first 90 % of the characters train, the rest is scored. The
loss is in nats per character whatever the tokenizer: the sum of -ln p over the tokens of the whole
validation text, each scored once with at least half a window before it, over its characters.
Training time is that of the steps and of compiling them; evaluations stop the clock. With
--nanogpt DIR (a checkout of karpathy/nanoGPT) its train.py runs its own CPU recipe before each of
ours, and its steps without an evaluation give its time. The last line is one JSON object.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a spinning thread stalls a busy machine

import argparse
import json
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.evaluation.loss import TokenPart, evaluate_stream
from tinyllm.model.init import build_model, count_parameters
from tinyllm.model.sizes import ModelParams, resolve
from tinyllm.model.transformer import Transformer
from tinyllm.params import build_params, read_yaml
from tinyllm.progress import Silent
from tinyllm.shards.batches import StreamBatches
from tinyllm.shards.stream import TokenStream
from tinyllm.tokenizer.tokenizer import Tokenizer
from tinyllm.tokenizer.train import TokenizerParams, train_bpe
from tinyllm.training.loop import train
from tinyllm.training.params import PretrainParams

ROOT = Path(__file__).parent.parent
TRAIN_SHARE = 0.9
EVALUATIONS = 6
NANOGPT = {  # the CPU recipe of its README; it tells the time of every step
    "device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 1, "block_size": 64,
    "batch_size": 12, "n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": 2000,
    "lr_decay_iters": 2000, "dropout": 0.0,
}  # fmt: skip
TARGETS = {"sprint": 1.8857, "five_minutes": 1.4697, "thirty_minutes": 1.40}
"""nanoGPT's CPU recipe, nanoGPT's best (an A100 for three minutes), and what is left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What differs from the shipped params.yaml."""

    vocab_size: int
    model: Mapping[str, Any]
    pretrain: Mapping[str, Any]


RECIPES = {
    "sprint": Recipe(
        vocab_size=512,
        model={"d": 128, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "max_seq_len": 64},
        pretrain={
            "steps": 220, "seq_len": 64, "batch_size": 12, "lr": 6e-3, "muon_lr": 4e-2,
            "warmup_steps": 10, "compile": "off", "decay_share": 0.8,
        },
    ),
    "five_minutes": Recipe(
        vocab_size=1024,
        model={"d": 256, "n_layers": 6, "max_seq_len": 128, "dropout": 0.1},
        pretrain={"steps": 560, "seq_len": 128, "batch_size": 16, "compile": "on"},
    ),
    "thirty_minutes": Recipe(
        vocab_size=1024,
        model={"d": 256, "n_layers": 6, "max_seq_len": 128, "dropout": 0.2},
        pretrain={"steps": 2000, "seq_len": 128, "batch_size": 16, "compile": "on"},
    ),
}  # fmt: skip


@dataclass
class Clock:
    """The seconds of training, without evaluations, and the loss at some of them."""

    started_s: float | None = None
    stopped_s: float = 0.0
    points: list[tuple[float, float]] = field(default_factory=list)

    def add(self, nats_per_character: float, asked_s: float) -> None:
        """Note a loss; what passed since `asked_s` does not count."""
        if self.started_s is None:  # the evaluation before the first step
            self.started_s = asked_s
        self.points.append((asked_s - self.started_s - self.stopped_s, nats_per_character))
        self.stopped_s += time.perf_counter() - asked_s

    def reaches(self, loss: float) -> float | None:
        """Return the seconds at which a loss was first seen, None: never."""
        return next((seconds for seconds, seen in self.points if seen <= loss), None)


def run_ours(text: str, recipe: Recipe, n_steps: int | None) -> tuple[Clock, int]:
    """Train by a recipe; return its clock and the number of parameters."""
    cut = int(len(text) * TRAIN_SHARE)
    settings = TokenizerParams(vocab_size=recipe.vocab_size, min_count=2, sample_bytes=10**9)
    tokenizer = Tokenizer(train_bpe([text[:cut]], settings))
    learned, held_out = (
        TokenStream([np.array(tokenizer.encode(part), np.uint16)])
        for part in (text[:cut], text[cut:])
    )
    n_characters = len(text) - cut
    split = TokenPart(stream=held_out, n_bytes=len(text[cut:].encode()))
    shipped = read_yaml(ROOT / "params.yaml")
    sizes = build_params(ModelParams, {**shipped["model"], **recipe.model}, "model")
    steps = n_steps or recipe.pretrain["steps"]
    knobs = {**shipped["pretrain"], **recipe.pretrain, "steps": steps, "sample_every": 0}
    knobs |= {"eval_every": max(steps // EVALUATIONS, 1), "save_every": 0, "log_every": 50}
    params = build_params(PretrainParams, knobs, "pretrain")
    model = build_model(resolve(sizes, tokenizer.vocab_size), shipped["seed"])
    clock = Clock()

    def evaluate(model: Transformer) -> dict[str, float]:
        asked_s = time.perf_counter()
        seq_len = params.seq_len
        report = evaluate_stream(
            model, split, seq_len=seq_len, batch_tokens=64 * seq_len,
            precision=params.precision, context=seq_len // 2,
        )  # fmt: skip
        nats_per_character = report.val_loss * report.n_tokens / n_characters
        clock.add(nats_per_character, asked_s)
        print(f"  {clock.points[-1][0]:7.1f} s  {nats_per_character:.4f} nats per character")
        return {"val_loss": report.val_loss}

    train(
        model, params, StreamBatches(learned, params.seq_len, params.batch_size, shipped["seed"]),
        evaluate=evaluate, sample=None, stage="time_to_loss", identity={}, seed=shipped["seed"],
        progress=Silent(),
    )  # fmt: skip
    return clock, count_parameters(model)


def run_nanogpt(directory: Path, text: str, n_steps: int | None) -> tuple[float, float]:
    """Run nanoGPT's train.py on the same characters.

    Returns:
        the seconds of its steps without evaluations, and the last validation loss it estimates.
    """
    data = directory / "data/shakespeare_char"
    characters = sorted(set(text))
    ids = np.array([characters.index(c) for c in text], np.uint16)
    cut = int(len(text) * TRAIN_SHARE)
    ids[:cut].tofile(data / "train.bin")
    ids[cut:].tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters)}))
    settings: dict[str, Any] = {**NANOGPT}
    if n_steps:
        settings |= {"max_iters": n_steps, "eval_interval": n_steps}
    words = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *words]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    losses = re.findall(r"^step \d+: .*val loss ([\d.]+)", done.stdout, re.MULTILINE)
    if done.returncode or not losses:
        raise SystemExit(f"{directory}/train.py ended with code {done.returncode}:\n{done.stderr}")
    times_ms = re.findall(r"^iter \d+: loss [\d.]+, time ([\d.]+)ms", done.stdout, re.MULTILINE)
    evaluated = re.findall(r"^step (\d+):", done.stdout, re.MULTILINE)
    steps_ms = [float(ms) for i, ms in enumerate(times_ms) if str(i) not in evaluated]
    seconds = statistics.fmean(steps_ms) * settings["max_iters"] / 1000
    print(f"nanoGPT:\n  {seconds:7.1f} s  {losses[-1]} nats per character")
    return seconds, float(losses[-1])


def main() -> None:
    """Run the recipes and print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--recipe", nargs="+", choices=list(RECIPES), default=["sprint"])
    parser.add_argument("--quick", action="store_true", help="a few steps of each")
    arguments = parser.parse_args()
    text, n_steps = arguments.text.read_text(encoding="utf-8"), 20 if arguments.quick else None
    figures: dict[str, Any] = {}
    for name in arguments.recipe:
        peer = run_nanogpt(arguments.nanogpt, text, n_steps) if arguments.nanogpt else None
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TINYLLM_INFLIGHT"] = folder
            print(f"{name}:")
            clock, n_parameters = run_ours(text, RECIPES[name], n_steps)
        seconds, loss = clock.points[-1]
        figures[name] = {
            "parameters": n_parameters, "seconds": round(seconds, 1), "nats_per_character": loss,
            "target": TARGETS[name], "target_reached_s": clock.reaches(TARGETS[name]),
        }  # fmt: skip
        if peer is not None:
            figures[name]["nanogpt_seconds"], figures[name]["nanogpt_nats_per_character"] = peer
            figures[name]["time_ratio"] = seconds / peer[0]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
