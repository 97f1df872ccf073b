"""The same bits from the same start, on one machine with one number of threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(*, wanted: bool) -> Iterator[None]:
    """Choose deterministic algorithms until the block ends, if wanted.

    Compiled code on the CPU needs it: the gradient of the embedding would be summed by atomic
    additions in the order in which threads arrive. Eager code on the CPU is deterministic by
    itself. On CUDA attention's backward pass would have to change; there a resumed run is equal but
    for rounding.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
