"""What a number was measured on. Machine-dependent by nature: kept out of every other artifact."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch


def fingerprint() -> dict[str, Any]:
    """Return what has to be equal for two speeds to be comparable; JSON values."""
    return {
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=False) or usable_cpus(),
        "usable_cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": metadata.version("onnxruntime"),
    }


def processor_name() -> str:
    """Return the processor's model as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """Return the name of the first CUDA device, None if there is none."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def usable_cpus() -> int:
    """Return how many logical processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_bytes() -> int:
    """Return the most physical memory that this process has held so far.

    From /proc where there is one: after `exec`, getrusage still has the peak of the process that
    started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024
