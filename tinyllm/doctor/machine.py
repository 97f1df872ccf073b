"""The machine and the environment: versions, cores, memory, disk, compiler, chosen operations."""

import platform
import shutil
from importlib import metadata
from pathlib import Path

import psutil
import torch

from tinyllm import paths
from tinyllm.artifact import list_files
from tinyllm.doctor.finding import Finding, problem
from tinyllm.evaluation.hardware import gpu_name, processor_name, usable_cpus
from tinyllm.ops import build
from tinyllm.ops.registry import describe

GIB = 1 << 30
LEAST_MEMORY_BYTES = 6 * GIB
"""What the shipped pipeline needs."""
LEAST_DISK_BYTES = 2 * GIB


def examine_machine(root: Path) -> list[Finding]:
    """Return what this machine offers, and what it has too little of."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(root)
    texts = [
        f"python {platform.python_version()}, torch {torch.__version__}, dvc {_version('dvc')}",
        f"{processor_name()}, {psutil.cpu_count(logical=False)} cores,"
        f" {usable_cpus()} usable, torch takes {torch.get_num_threads()} threads",
        f"memory: {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
        f"GPU: {gpu_name() or 'none'}",
    ]
    findings = [Finding(section="machine", text=text) for text in texts]
    if memory.total < LEAST_MEMORY_BYTES:
        findings.append(
            problem(
                "machine",
                f"the shipped pipeline may need {LEAST_MEMORY_BYTES / GIB:.0f} GiB of memory",
                "tinyllm preset smoke",
            )
        )
    return [*findings, _disk(root, disk.free), _compiler()]


def examine_operations() -> list[Finding]:
    """Return which implementation of each operation runs here, and why."""
    return [
        Finding(section="operations", text=f"{row.operation}: {row.backend} ({row.why})")
        for row in describe()
    ]


def _version(name: str) -> str:
    """Return a package's version."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _disk(root: Path, free_bytes: int) -> Finding:
    """Compare the free space with twice the largest output: DVC keeps each one twice."""
    largest = max((_size(root / path) for path in _outputs()), default=0)
    text = f"disk: {free_bytes / GIB:.1f} GiB free"
    if free_bytes >= max(LEAST_DISK_BYTES, 2 * largest):
        return Finding(section="machine", text=text)
    needed = max(LEAST_DISK_BYTES, 2 * largest) / GIB
    return problem(
        "machine", f"{text}, {needed:.1f} wanted", "dvc gc --workspace --all-experiments"
    )


def _outputs() -> list[Path]:
    """Return the artifacts of the pipeline."""
    return [paths.RAW, paths.CLEAN, paths.TOKENS, paths.PRETRAIN, paths.LORA, paths.EXPORT]


def _size(directory: Path) -> int:
    """Return the bytes of a folder's files; 0 if there is none."""
    return sum((directory / name).stat().st_size for name in list_files(directory))


def _compiler() -> Finding:
    """Return the C++ compiler, or why none is used."""
    if reason := build.obstacle():
        text = f"compiler: none used: {reason}; operations fall back to torch"
        return Finding(section="machine", text=text)
    return Finding(section="machine", text=f"compiler: {build.compiler()}")
