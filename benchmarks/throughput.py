"""Tokens per second of a training step: ours, plain torch and nanoGPT, in turns in one run.

    python benchmarks/throughput.py [--quick] [--threads 2] [--nanogpt DIR] [--save]

Plain torch is a GPT-2 written as most people would: eager in fp32, and compiled in bf16 with fused
AdamW and SDPA. With `--nanogpt` the folder's own model.py and optimizer take part. All have equal
layers, width, heads, context and batch; our blocks have 6 % fewer weights (SwiGLU, two key-value
heads). Every candidate has a process of its own and makes one step per round; medians count. The
last line is one JSON object.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a spinning thread stalls a busy machine

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm.artifact import write_json
from tinyllm.evaluation.hardware import fingerprint
from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelParams, resolve
from tinyllm.model.transformer import Transformer
from tinyllm.params import build_params, read_yaml
from tinyllm.progress import Silent
from tinyllm.shards.batches import Batch
from tinyllm.training import speed
from tinyllm.training.determinism import deterministic
from tinyllm.training.params import PretrainParams
from tinyllm.training.step import Stepper

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
D, HEADS, CONTEXT, VOCAB = 256, 4, 256, 8192
LR, BETAS, DECAY = 3e-3, (0.9, 0.95), 0.1
CPU = torch.device("cpu")
PLAIN = ("torch, eager fp32", "torch, compiled bf16")
NANOGPT = ("nanoGPT, eager fp32", "nanoGPT, compiled bf16")
WARM_UP = 2

Step = Callable[[Tensor, Tensor], object]
"""(ids, targets), both (B, T): one optimizer step."""


class PlainBlock(nn.Module):
    """A GPT-2 block without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (B, T, D)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class PlainGPT(nn.Module):
    """Embeddings, blocks, tied head, mean loss."""

    def __init__(self, n_layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, D), nn.Embedding(CONTEXT, D)
        self.blocks = nn.Sequential(*(PlainBlock() for _ in range(n_layers)))
        self.norm, self.head = nn.LayerNorm(D, bias=False), nn.Linear(D, VOCAB, bias=False)
        nn.init.normal_(self.tokens.weight, 0, 0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss."""
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain_step(loss: nn.Module, optimizer: torch.optim.Optimizer, *, fast: bool) -> Step:
    """Return a step of any model whose call gives its loss; fast: compiled in bf16."""
    called: Callable[..., Any] = torch.compile(loss, dynamic=False) if fast else loss
    parameters = list(loss.parameters())

    def context() -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if fast else nullcontext()

    def step(ids: Tensor, targets: Tensor) -> None:
        with context():
            result = called(ids, targets)
        torch.autograd.backward(result[1] if isinstance(result, tuple) else result)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_model(n_layers: int) -> Transformer:
    """Return our model in the sizes of this benchmark, all else as shipped."""
    sizes = {**read_yaml(ROOT / "params.yaml")["model"], "d": D, "n_layers": n_layers}
    params = build_params(ModelParams, {**sizes, "n_heads": HEADS}, "benchmark")
    return build_model(resolve(params, VOCAB), 0)


def our_step(n_layers: int, batch_size: int, optimizer: str) -> Step:
    """Return our compiled step as the pipeline makes it."""
    settings = {**read_yaml(ROOT / "params.yaml")["pretrain"], "seq_len": CONTEXT}
    settings |= {"batch_size": batch_size, "accumulate": 1, "optimizer": optimizer}
    params = build_params(PretrainParams, {**settings, "precision": "bf16"}, "benchmark")
    stepper = Stepper(our_model(n_layers), params, CPU, compiled=True, progress=Silent())
    steps = iter(range(params.steps))

    def step(ids: Tensor, targets: Tensor) -> None:
        with deterministic(wanted=True):
            stepper.run(next(steps), [Batch(ids.numpy(), targets.numpy(), None)])
        if not stepper.compiled:
            raise SystemExit("torch.compile does not work here")

    return step


def nanogpt_step(folder: Path, n_layers: int, *, fast: bool) -> Step:
    """Return a step of nanoGPT's own model and optimizer."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder}: has no model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        **{"block_size": CONTEXT, "vocab_size": VOCAB, "n_layer": n_layers, "n_head": HEADS},
        **{"n_embd": D, "dropout": 0.0, "bias": False},
    )
    model = module.GPT(config)
    optimizer = model.configure_optimizers(DECAY, LR, BETAS, "cpu")
    return plain_step(model, optimizer, fast=fast)


def build_step(name: str, n_layers: int, batch_size: int, nanogpt: Path | None) -> Step:
    """Return the step of a candidate."""
    who, kind = name.split(", ")
    if who == "ours":
        return our_step(n_layers, batch_size, kind)
    fast = kind == "compiled bf16"
    if who == "nanoGPT":
        assert nanogpt is not None
        return nanogpt_step(nanogpt, n_layers, fast=fast)
    model = PlainGPT(n_layers)
    settings = {"lr": LR, "betas": BETAS, "weight_decay": DECAY}
    optimizer = torch.optim.AdamW(model.parameters(), fused=fast, **settings)  # type: ignore[arg-type]
    return plain_step(model, optimizer, fast=fast)


def work(turns: Connection, threads: int, batch_size: int, *candidate: Any) -> None:
    """Make a step whenever asked, and tell its seconds; a process of its own."""
    torch.set_num_threads(threads)
    step = build_step(*candidate)
    draw = np.random.default_rng(1)
    while turns.recv():
        tokens = torch.from_numpy(draw.integers(0, VOCAB, (batch_size, CONTEXT + 1)))
        ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        started_s = time.perf_counter()
        step(ids, targets)
        turns.send(time.perf_counter() - started_s)


def time_in_turns(
    names: Sequence[str],
    threads: int,
    n_layers: int,
    batch_size: int,
    nanogpt: Path | None,
    rounds: int,
) -> tuple[dict[str, float], float]:
    """Return the median seconds of a step of each, and the median of torch's best FLOP/s in bf16.

    The first two steps, which compile, do not count.
    """
    start = multiprocessing.get_context("spawn")
    workers = []
    for name in names:
        here, there = start.Pipe()
        arguments = (there, threads, batch_size, name, n_layers, batch_size, nanogpt)
        start.Process(target=work, args=arguments, daemon=True).start()
        there.close()
        workers.append(here)
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks = []
    for _ in range(WARM_UP + rounds):
        peaks.append(speed.peak_flops_per_s(torch.bfloat16, CPU))
        for name, turns in zip(names, workers, strict=True):
            turns.send(True)
            times[name].append(turns.recv())
    for turns in workers:
        turns.send(False)
    medians = {name: statistics.median(seconds[WARM_UP:]) for name, seconds in times.items()}
    return medians, statistics.median(peaks)


def main() -> None:
    """Print a table, then one JSON object with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="2 layers, batch 4, 3 rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--save", action="store_true", help=f"write into {RESULTS.name}/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    n_layers, batch_size, rounds = (2, 4, 3) if options.quick else (6, 16, 12)
    names = ["ours, adamw", *PLAIN] if options.quick else ["ours, adamw", "ours, muon", *PLAIN]
    names += NANOGPT if options.nanogpt else []
    seconds, peak = time_in_turns(
        names, options.threads, n_layers, batch_size, options.nanogpt, rounds
    )
    tokens, first = batch_size * CONTEXT, seconds["ours, adamw"]
    print(f"{n_layers} layers, d {D}, context {CONTEXT}, batch {batch_size}, vocabulary {VOCAB}")
    print(f"{'':26}{'ms/step':>9}{'tokens/s':>10}{'ours is':>9}")
    for name, s in seconds.items():
        print(f"{name:26}{s * 1e3:9.0f}{tokens / s:10.0f}{s / first:8.2f}x")
    flops = speed.flops_per_token(our_model(n_layers), CONTEXT) * tokens / first
    share = flops / peak
    print(f"ours: {share:.0%} of torch's rate for a large bf16 product, measured between the steps")
    result = {
        "speedup": {name: round(s / first, 3) for name, s in seconds.items()},
        "tokens_per_s": {name: round(tokens / s) for name, s in seconds.items()},
        "mfu": round(share, 3),
        "machine": fingerprint(),
    }
    if options.save:
        write_json(RESULTS / "throughput.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
