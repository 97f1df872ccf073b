"""INT8 linear layers: ours, `torch._int_mm`, and float ones, beside the raw read speed, in one run.

    python benchmarks/int8_linear.py [--threads 1] [--rows 1] [--save]

Candidates take turns, sample by sample, so that a busy moment hits all of them; a sample during
which the process lost its core is dropped. Decoding (--rows 1) is bound by reading the weights:
compare GB/s with the ceiling. Prefill (--rows 256) is bound by arithmetic: compare GOP/s.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a spinning thread stalls a busy machine

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllm.artifact import write_json
from tinyllm.evaluation.hardware import processor_name
from tinyllm.ops import cpu, library
from tinyllm.ops.linear import quantize_per_row

SHAPES = [(256, 256), (704, 256), (256, 704), (2048, 256), (1024, 1024), (4096, 4096)]
SAMPLES, SAMPLE_S = 60, 2e-3
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What one candidate needed for one shape."""

    best_us: float
    median_us: float
    clean_samples: int


def time_in_turns(candidates: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    """Return the timing of each candidate from `SAMPLES` rounds in which each has one turn."""
    repeats = {}
    for name, run in candidates.items():
        run()
        started_s = time.perf_counter()
        run()
        repeats[name] = max(1, int(SAMPLE_S / (time.perf_counter() - started_s)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(SAMPLES):
        for name, run in candidates.items():
            switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            started_s = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            seconds = (time.perf_counter() - started_s) / repeats[name]
            if resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == switches:
                samples[name].append(seconds * 1e6)
    return {
        name: Timing(
            best_us=round(min(values), 2),
            median_us=round(statistics.median(values), 2),
            clean_samples=len(values),
        )
        for name, values in samples.items()
        if values
    }


def candidates(n: int, k: int, rows: int) -> dict[str, Callable[[], object]]:
    """Return what is measured for a weight of N outputs and K inputs, by name."""
    weight, x = torch.randn(n, k), torch.randn(rows, k)
    weight_q, scale = quantize_per_row(weight)
    weight_bf16, x_bf16 = weight.bfloat16(), x.bfloat16()
    linear, by_torch = (b.bind_linear_w8a8(weight_q, scale) for b in (cpu, library))
    x_q, weight_KN = quantize_per_row(x)[0], weight_q.T
    words: Tensor = weight_q.flatten().view(torch.int64)
    return {
        "raw read": lambda: torch.sum(words),
        "ours": lambda: linear(x),
        "_int_mm + ours around": lambda: by_torch(x),
        "_int_mm alone": lambda: torch._int_mm(x_q, weight_KN),
        "F.linear bf16": lambda: F.linear(x_bf16, weight_bf16),
        "F.linear fp32": lambda: F.linear(x, weight),
    }


def show(n: int, k: int, rows: int, timings: Mapping[str, Timing]) -> None:
    """Print one shape: times, weights read per second, arithmetic, and the ratio to ours."""
    ours_us = timings["ours"].median_us if "ours" in timings else float("nan")
    print(f"\nN {n}  K {k}  M {rows}  ({n * k / 1e6:.2f} MB in INT8)")
    print(f"{'':24}{'best us':>10}{'median us':>11}{'Gweights/s':>12}{'GOP/s':>9}{'/ ours':>8}")
    for name, t in timings.items():
        rate = n * k / t.median_us / 1e3
        print(
            f"{name:24}{t.best_us:10.2f}{t.median_us:11.2f}{rate:12.1f}"
            f"{2 * rows * rate:9.0f}{t.median_us / ours_us:8.2f}"
        )


def main() -> int:
    """Measure every shape and print the tables; `--save` also writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1, help="M: 1 is decoding")
    parser.add_argument("--save", action="store_true", help=f"write into {RESULTS.name}/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if cpu.load()[0] is None:
        print(f"no native kernels to measure: {cpu.load()[1]}")
        return 1
    machine = {
        "processor": processor_name(),
        "instruction_set": cpu.ISAS[cpu.best_isa()],
        "threads": options.threads,
        "rows": options.rows,
        "torch": torch.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    tables = []
    with torch.inference_mode():
        for n, k in SHAPES:
            timings = time_in_turns(candidates(n, k, options.rows))
            show(n, k, options.rows, timings)
            figures = {name: asdict(timing) for name, timing in timings.items()}
            tables.append({"n": n, "k": k, "timings": figures})
    if options.save:
        name = f"int8_linear-{machine['instruction_set']}-m{options.rows}-t{options.threads}.json"
        write_json(RESULTS / name, {"machine": machine, "shapes": tables})
    return 0


if __name__ == "__main__":
    sys.exit(main())
