"""Causal attention in bf16: ours and torch's (SDPA), forward and with backward, in one run.

    python benchmarks/attention.py [--threads 2] [--quick]

Both take turns, sample by sample, so that a busy moment hits both; compare the ratios of medians.
The ceiling is torch's bf16 matrix product in the same run, about 98 % of what `vdpbf16ps` can do.
Half of the table of scores counts as work. The last line is JSON.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a spinning thread stalls a busy machine

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm.evaluation.hardware import processor_name
from tinyllm.ops import cpu, flash, reference

B, H = 4, 8
TOKENS, WIDTHS = (256, 512, 1024), (32, 64, 128)
FORWARD, BACKWARD = 2, 5
"""Matrix products of each direction; every one is B H T^2 K multiply-adds on half a square."""


def in_turns(candidates: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the median time of each, in ms, from rounds in which each has one turn."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s or len(samples["ours"]) < 5:
        for name, run in candidates.items():
            started_s = time.perf_counter()
            run()
            samples[name].append((time.perf_counter() - started_s) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def candidates(t: int, k: int) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], Tensor]:
    """Return the forward passes by name, their inputs and a gradient of the output."""
    inputs = [torch.randn(B, t, H, k).bfloat16().transpose(1, 2).requires_grad_() for _ in range(3)]
    d_o = torch.randn(B, t, H, k).bfloat16().transpose(1, 2)

    def by_torch() -> Tensor:
        q, k_, v = inputs
        y: Tensor = F.scaled_dot_product_attention(q, k_, v, is_causal=True)
        return y

    def ours() -> Tensor:
        q, k_, v = inputs
        return flash.attention(q, k_, v, None, 0, k**-0.5)

    return {"ours": ours, "torch": by_torch}, inputs, d_o


def errors(runs: Mapping[str, Callable[[], Tensor]], inputs: list[Tensor], k: int) -> float:
    """Return our error against fp64 as a multiple of torch's, forward."""
    q, k_, v = (x.detach().double() for x in inputs)
    exact = reference.attention(q, k_, v, None, 0, k**-0.5)
    error = {name: float((run().detach().double() - exact).norm()) for name, run in runs.items()}
    return error["ours"] / error["torch"]


def measure(t: int, k: int, seconds: float) -> dict[str, float]:
    """Measure one shape and print its row."""
    runs, inputs, d_o = candidates(t, k)
    square = torch.randn(1024, 1024).bfloat16()
    with torch.no_grad():
        error = errors(runs, inputs, k)
        forward = in_turns({**runs, "product": lambda: square @ square}, seconds)

    def and_back(run: Callable[[], Tensor]) -> Callable[[], object]:
        """Return the forward pass with the backward pass behind it."""
        return lambda: torch.autograd.grad(run(), inputs, d_o)

    both = in_turns({name: and_back(run) for name, run in runs.items()}, seconds)
    work = B * H * t * t * k / 1e6  # half of 2 t t k, in 10^6: GFLOP/s from ms
    peak = 2 * 1024**3 / 1e6 / forward["product"]
    row = {
        "tokens": t,
        "width": k,
        "forward": round(forward["torch"] / forward["ours"], 2),
        "forward_backward": round(both["torch"] / both["ours"], 2),
        "error": round(error, 2),
        "forward_gflops": round(FORWARD * work / forward["ours"]),
        "forward_backward_gflops": round((FORWARD + BACKWARD) * work / both["ours"]),
        "product_gflops": round(peak),
    }
    print(
        f"{t:6}{k:6}{forward['ours']:9.2f}{forward['torch']:9.2f}{row['forward']:8.2f}"
        f"{both['ours']:11.2f}{both['torch']:9.2f}{row['forward_backward']:8.2f}"
        f"{row['error']:8.2f}{row['forward_gflops']:9.0f}{row['forward_backward_gflops']:9.0f}"
        f"{row['product_gflops']:9.0f}",
        flush=True,
    )
    return row


def main() -> int:
    """Measure every shape; print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="under 50 s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if cpu.load()[0] is None:
        print(f"no native kernels to measure: {cpu.load()[1]}")
        return 1
    isa = cpu.ISAS[cpu.best_isa()]
    print(f"{processor_name()}, {isa}, {options.threads} threads, bf16, B {B}, H {H}; medians, ms")
    print(
        f"{'T':>6}{'K':>6}{'ours':>9}{'torch':>9}{'ratio':>8}{'ours f+b':>11}{'torch':>9}"
        f"{'ratio':>8}{'error/':>8}{'GFLOP/s':>9}{'f+b':>9}{'product':>9}"
    )
    rows = [measure(t, k, 0.7 if options.quick else 4.0) for t in TOKENS for k in WIDTHS]
    worst = {
        "forward_min": min(row["forward"] for row in rows),
        "forward_backward_min": min(row["forward_backward"] for row in rows),
        "error_max": max(row["error"] for row in rows),
    }
    print(json.dumps({"isa": isa, "threads": options.threads, **worst, "shapes": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
