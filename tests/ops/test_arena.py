"""Memory of packed weights comes from the system, not from what a training left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllm.ops import cpu

LEFT_BEHIND = """
import torch
from tinyllm.ops.cpu import Arena

tensor = torch.ones(32 << 20)
del tensor
memory = Arena(64 << 20).take(64 << 20)
place = memory.data_ptr() + (32 << 20)
found = False
for line in open("/proc/self/smaps"):
    name, *rest = line.split()
    if not name.endswith(":"):
        first, end = (int(x, 16) for x in name.split("-"))
        found = first <= place < end
    elif found and name in ("Rss:", "VmFlags:"):
        print(*rest)
"""


def test_weights_get_fresh_memory_that_may_have_large_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no large pages")
    if cpu.load()[0] is None:
        pytest.skip(f"no native kernels here: {cpu.load()[1]}")
    keeps = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
    run = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND],
        env={**os.environ, **keeps},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    resident, flags = run.stdout.splitlines()
    assert resident == "0 kB"
    assert "hg" in flags.split()
