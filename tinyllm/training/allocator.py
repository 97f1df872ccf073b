"""Memory that one training step frees is kept for the next one."""

import ctypes
import functools
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h."""
NEVER, MAPPED_ALONE = 2**31 - 1, 32 * 2**20


@functools.cache
def keep_freed_memory() -> None:
    """Tell the C library, where it is glibc, not to give memory back between steps.

    By itself it returns freed tensors to the system, which fills the same pages with zeros again in
    the next step: 32,000 to 43,000 page faults and 0.13 of the time of a step of 6 layers, d = 256
    and 4096 tokens on 2 cores. Tensors above 32 MiB are still returned, so the heap has no large
    holes. The peak of memory stays: 1.22 to 1.29 GB without and with it in eager fp32. Variables of
    glibc that a user has set win.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(M_MMAP_THRESHOLD, MAPPED_ALONE)
        mallopt(M_TRIM_THRESHOLD, NEVER)
