"""Peak memory and tokens per second of a training step with each saving added to those before it.

    python benchmarks/memory.py [--quick] [--save]

Every rung is two processes, because memory that was once used is seldom given back. The peak is
what the step added to the first, in which freed memory goes back to the system at once; libraries
are warm by then. The estimate beside it is that of `tinyllm plan`. The second runs as training
does, with the memory that the C library holds for the next step; the tokens per second are its own.
The last line is one JSON object.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a spinning thread stalls a busy machine

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm.artifact import write_json
from tinyllm.evaluation.hardware import fingerprint
from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelConfig, ModelParams, resolve
from tinyllm.model.transformer import next_token_loss
from tinyllm.params import build_params, read_yaml
from tinyllm.progress import Silent
from tinyllm.training import step as step_module
from tinyllm.training.memory import blank_batch, estimate_memory
from tinyllm.training.params import PretrainParams
from tinyllm.training.step import Stepper

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SIZES = {"vocab_size": 8192, "seq_len": 256, "batch_size": 16}
RUNGS: list[tuple[str, dict[str, Any]]] = [
    ("fp32, AdamW, all logits", {"precision": "fp32", "optimizer": "adamw", "chunked": False}),
    ("+ bf16", {"precision": "bf16"}),
    ("+ chunked loss", {"chunked": True}),
    ("+ checkpoint: selective", {"checkpoint": "selective"}),
    ("+ checkpoint: blocks", {"checkpoint": "blocks"}),
    ("+ 8-bit AdamW", {"optimizer": "adamw8bit"}),
]
QUICK_RUNGS = (0, 5)
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Buffers beyond 64 KB go back to the system at once, so that the process shows what is held."""


def measure(given: dict[str, Any]) -> dict[str, float]:
    """Return peak and estimate in bytes and tokens per second of one setting, here and now."""
    document = read_yaml(ROOT / "params.yaml")
    steps, chunked = given.pop("steps", 3), given.pop("chunked", True)
    steady = STEADY.items() <= os.environ.items()
    vocab_size, model = given.pop("vocab_size"), given.pop("model", {})
    settings = {**document["pretrain"], "compile": "off", **given}
    params = build_params(PretrainParams, settings, "benchmark")
    sizes = build_params(ModelParams, {**document["model"], **model}, "benchmark")
    config = resolve(sizes, vocab_size)
    if not chunked:
        vars(step_module)["linear_cross_entropy"] = _all_logits
    need = estimate_memory(config, params, params.batch_size).total if steady else 0
    _steps(config, params, 1)
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    times = _steps(config, params, steps)
    return {
        "peak_bytes": _status("VmHWM") - before,
        "estimated_bytes": need,
        "tokens_per_s": params.tokens_per_step / statistics.median(times[1:]),
    }


def _steps(config: ModelConfig, params: PretrainParams, n: int) -> list[float]:
    """Return the seconds of the first steps of a new model."""
    model = build_model(config, 0)
    model.checkpoint = params.checkpoint
    stepper = Stepper(model, params, torch.device("cpu"), compiled=False, progress=Silent())
    batch, times = blank_batch(params.batch_size, params.seq_len, packed=False), []
    for i in range(n):
        started_s = time.perf_counter()
        stepper.run(i, [batch] * params.accumulate)
        times.append(time.perf_counter() - started_s)
    return times


def _all_logits(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the loss from the logits of all positions at once."""
    return next_token_loss(F.linear(x, weight)[None], targets[None])


def _status(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def in_own_process(settings: dict[str, Any], *, steady: bool = True) -> dict[str, float]:
    """Return what `measure` returns in a new process."""
    command = [sys.executable, __file__, "--measure", json.dumps(settings)]
    environment = {**os.environ, **(STEADY if steady else {})}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print the ladder, then one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="two rungs, a quarter of the batch")
    parser.add_argument("--save", action="store_true", help=f"write into {RESULTS.name}/")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))))
        return
    settings: dict[str, Any] = {**SIZES, "steps": 6}
    if options.quick:
        settings |= {"batch_size": 4, "steps": 2}
    print(f"{'':28}{'peak MB':>9}{'plan MB':>9}{'as run MB':>11}{'tokens/s':>10}")
    rows = []
    for number, (name, change) in enumerate(RUNGS):
        settings |= change
        if options.quick and number not in QUICK_RUNGS:
            continue
        row, as_run = in_own_process(settings), in_own_process(settings, steady=False)
        row |= {"as_run_bytes": as_run["peak_bytes"], "tokens_per_s": as_run["tokens_per_s"]}
        rows.append({"name": name, **row})
        peak, plan, held = (row[f"{kind}_bytes"] / 1e6 for kind in ("peak", "estimated", "as_run"))
        print(f"{name:28}{peak:9.0f}{plan:9.0f}{held:11.0f}{row['tokens_per_s']:10.0f}", flush=True)
    share = rows[-1]["peak_bytes"] / rows[0]["peak_bytes"]  # type: ignore[operator]
    result = {"peak_share": round(share, 3), "rungs": rows, "machine": fingerprint()}
    if options.save:
        write_json(RESULTS / "memory.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
