"""Everything that is measured on a card, in one file: ceilings, kernels, decoding, training.

    python benchmarks/gpu.py [--out DIR]

Writes <card>-<date>.json into benchmarks/results; `python benchmarks/perf_table.py` makes
kernels/PERF.md of all of them. Ceilings are measured in the same call: compare shares, not times.
Without a card it says so and measures nothing.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gpu_kernels
import torch

from tinyllm.artifact import write_json
from tinyllm.evaluation.hardware import fingerprint
from tinyllm.inference.generate import generate
from tinyllm.inference.sampling import SamplingParams
from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelParams, resolve
from tinyllm.model.transformer import Transformer
from tinyllm.ops import cuda_build
from tinyllm.params import build_params, read_yaml
from tinyllm.preset import merge
from tinyllm.progress import Silent
from tinyllm.quantization.int8 import quantize_model
from tinyllm.shards.batches import Batch
from tinyllm.training import speed
from tinyllm.training.params import PretrainParams
from tinyllm.training.step import Stepper

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
VOCAB = 8192
WARM_UP, STEPS = 3, 12
"""Of training; the first ones compile."""


def training(device: torch.device, preset: str, steps: int) -> dict[str, Any]:
    """Train a preset on random tokens; return tokens per second and MFU.

    MFU as in `tinyllm.training.speed`, of the bf16 product measured here and now.
    """
    document = merge(read_yaml(ROOT / "params.yaml"), read_yaml(_preset(preset)), preset)
    model = _build(document)
    params = build_params(PretrainParams, {**document["pretrain"], "precision": "bf16"}, preset)
    compiled = params.compile == "on"
    stepper = Stepper(model.to(device), params, device, compiled=compiled, progress=Silent())
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for step in range(WARM_UP + steps):
        shape = (params.batch_size, params.seq_len + 1)
        batches = []
        for _ in range(params.accumulate):
            ids = torch.randint(model.config.vocab_size, shape, generator=generator)
            batches.append(Batch(ids[:, :-1].numpy(), ids[:, 1:].numpy(), None))
        speed.synchronise(device)
        started_s = time.perf_counter()
        stepper.run(step, batches)
        speed.synchronise(device)
        seconds.append(time.perf_counter() - started_s)
    step_s = speed.median_step_s(seconds[WARM_UP:])
    rate = params.accumulate * params.batch_size * params.seq_len / step_s
    peak = speed.peak_flops_per_s(torch.bfloat16, device)
    return {
        "preset": preset,
        "compiled": stepper.compiled,
        "tokens_per_s": round(rate),
        "mfu": round(rate * speed.flops_per_token(model, params.seq_len) / peak, 3),
        "peak_memory_bytes": speed.peak_memory_bytes(device),
    }


def decoding(device: torch.device, n_tokens: int) -> dict[str, float]:
    """Decode with the shipped small model in bf16 and in INT8; return tokens per second."""
    rates = {}
    for name in ("bf16, eager", "bf16", "INT8"):
        model = _build(read_yaml(ROOT / "params.yaml")).to(torch.bfloat16).eval()
        if name == "INT8":
            model = quantize_model(model)
        model = model.to(device)
        for _ in range(2):
            tokens = generate(model, [1, 2, 3], SamplingParams(max_new_tokens=n_tokens), ())
            if name == "bf16, eager" and tokens._reader is not None:
                tokens._reader._graph = None
            next(tokens), next(tokens)
            speed.synchronise(device)
            started_s = time.perf_counter()
            n = sum(1 for _ in tokens)
            rates[name] = round(n / (time.perf_counter() - started_s), 1)
    return rates


def _build(document: dict[str, Any]) -> Transformer:
    """Return a new model with the sizes of a params document."""
    vocabulary = document["prune"]["vocab_size"] or VOCAB
    params = build_params(ModelParams, document["model"], "benchmark")
    return build_model(resolve(params, vocabulary), 0)


def _preset(name: str) -> Path:
    """Return the file of a preset."""
    return ROOT / "presets" / f"{name}.yaml"


def _commit() -> str:
    """Return the commit that was measured."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def measure(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Measure everything; tiny: at sizes for a test without a card."""
    sizes = (64, 1 << 12, 1) if tiny else (8192, 1 << 30, 20)
    result: dict[str, Any] = {
        "machine": {**fingerprint(), "cuda": torch.version.cuda, "commit": _commit()},
        "compiler": cuda_build.compiler().name,
        "ceilings": gpu_kernels.ceilings(device, *sizes),
        "kernels": gpu_kernels.all_rows(device, tiny=tiny),
        "decode_tokens_per_s": decoding(device, 4 if tiny else 200),
    }
    result["training"] = training(device, "smoke" if tiny else "medium", 2 if tiny else STEPS)
    return result


def main() -> int:
    """Measure and write the file; the last line is its path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was measured")
        return 0
    card = torch.cuda.get_device_name(0)
    result = {"card": card, **measure(torch.device("cuda"), tiny=False)}
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    path = options.out / f"{slug}-{datetime.now(UTC):%Y-%m-%d}.json"
    write_json(path, result)
    print(json.dumps(result["ceilings"]))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
