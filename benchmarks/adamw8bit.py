"""One step of AdamW with 8-bit states on the CPU: ours, bitsandbytes' and torch's fp32, in one run.

    python benchmarks/adamw8bit.py [--threads 1] [--quick]

All take turns; compare the ratios of medians. The error is the distance of the way that the
parameters went from that of AdamW in fp64, as a share of it. The last line is JSON.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a spinning thread stalls a busy machine

import argparse
import json
import logging
import statistics
import sys
import time
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from tinyllm.evaluation.hardware import processor_name
from tinyllm.ops import cpu
from tinyllm.training.adamw8bit import AdamW8bit

N = 1 << 22
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def build(begin: torch.Tensor) -> dict[str, tuple[Parameter, Optimizer]]:
    """Return a parameter and its optimizer for every candidate."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.optim.adamw import AdamW8bit as Theirs

    exact, fp32, theirs, ours = (
        Parameter(begin.to(d, copy=True)) for d in (torch.float64, *[torch.float32] * 3)
    )
    groups = [{"params": [ours], "weight_decay": OPTIONS["weight_decay"]}]
    own = {name: OPTIONS[name] for name in ("lr", "betas", "eps")}
    return {
        "fp64": (exact, torch.optim.AdamW([exact], **OPTIONS)),
        "torch fused fp32": (fp32, torch.optim.AdamW([fp32], fused=True, **OPTIONS)),
        "bitsandbytes": (theirs, Theirs([theirs], **OPTIONS)),  # type: ignore[no-untyped-call]
        "ours": (ours, AdamW8bit(groups, **own)),
    }


def main() -> int:
    """Measure; print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="under 50 s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if cpu.load()[0] is None:
        print(f"no native kernels to measure: {cpu.load()[1]}")
        return 1
    torch.manual_seed(0)
    begin, mean = torch.randn(N) * 0.02, torch.randn(N)
    candidates = build(begin)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(12 if options.quick else 60):
        gradient = mean * 1e-3 + torch.randn(N) * 2e-3
        for name, (parameter, optimizer) in candidates.items():
            parameter.grad = gradient.to(parameter.dtype)
            started_s = time.perf_counter()
            optimizer.step()
            samples[name].append(time.perf_counter() - started_s)
    way = candidates["fp64"][0].detach() - begin.double()
    print(f"{processor_name()}, {cpu.ISAS[cpu.best_isa()]}, {options.threads} threads, {N} numbers")
    print(f"{'':18}{'ms':>9}{'M/s':>8}{'error':>10}")
    seconds = {name: statistics.median(values[1:]) for name, values in samples.items()}
    error = {}
    for name, (parameter, _) in candidates.items():
        apart = (parameter.detach().double() - begin.double()) - way
        error[name] = float(apart.norm() / way.norm())
        print(
            f"{name:18}{seconds[name] * 1e3:9.2f}{N / seconds[name] / 1e6:8.0f}{error[name]:10.2e}"
        )
    figures = {
        "speedup": round(seconds["bitsandbytes"] / seconds["ours"], 2),
        "error": round(error["ours"] / error["bitsandbytes"], 3),
        "of_fused_fp32": round(seconds["torch fused fp32"] / seconds["ours"], 3),
        "threads": options.threads,
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
