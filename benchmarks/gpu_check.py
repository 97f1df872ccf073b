"""`make gpu-check`: tests, sanitizer, measurements and the smoke pipeline on this machine's card.

    python benchmarks/gpu_check.py

Every part has its share of 8 minutes and is stopped beyond it. Without a card: one line, exit 0.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
ON_CARD = ["tests/cuda/test_on_card.py", "-m", "gpu"]
SANITIZED = [*ON_CARD, "-k", "small"]
"""A sanitizer makes a kernel a hundred times as slow."""


def parts() -> list[tuple[str, list[str], int]]:
    """Return name, command and most seconds of each part."""
    python, pytest = sys.executable, [sys.executable, "-m", "pytest"]
    checks = [("tests", [*pytest, "-m", "gpu", "tests"], 150)]
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *pytest, *SANITIZED]
            checks.append((tool, command, 40))
    return [
        *checks,
        ("measurements", [python, "benchmarks/gpu.py"], 130),
        ("PERF.md", [python, "benchmarks/perf_table.py"], 10),
        ("smoke pipeline", ["bash", "tests/smoke.sh"], 110),
    ]


def main() -> int:
    """Run every part; return 1 if one fails or takes too long."""
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device; nothing was checked or measured")
        return 0
    failed = []
    began_s = time.perf_counter()
    for name, command, most_s in parts():
        started_s = time.perf_counter()
        print(f"== {name}", flush=True)
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=most_s, check=False)
            words = "passed" if done.returncode == 0 else f"failed ({done.returncode})"
        except subprocess.TimeoutExpired:
            words = f"stopped after {most_s} s"
        print(f"== {name}: {words}, {time.perf_counter() - started_s:.0f} s", flush=True)
        if words != "passed":
            failed.append(name)
    seconds = time.perf_counter() - began_s
    print(f"gpu-check: {seconds:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
