"""What the tests of CUDA kernels share."""

import emulator
import pytest
import torch

seeds = pytest.mark.parametrize("seed", [0, 1, 2])
"""Of the emulator's scheduler: how often warps take turns, and in which order."""
formats = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
two_formats = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"]
)
"""Each format is a program that takes a second or more to compile; the gates compile all."""


edits = ()
"""Of the sources, for mutants: (file, old text, new text)."""


def runner(seed):
    """Return what runs launches in the emulator."""

    def run(launch):
        here = [edit for edit in edits if edit[0].endswith(".h") or edit[0] == launch.source]
        return emulator.run(launch, seed, tuple(here))

    return run


def no_worse(ours, theirs, truth, times, largest=None):
    """Assert that our largest error is at most `times` that of plain torch in the same format.

    Where torch's own comes out as nearly nothing, an error of rounding once is always allowed: of
    the largest result, or of the largest number on the way to it.
    """
    assert ours.shape == truth.shape
    error = (ours.double() - truth).abs().max()
    largest = truth.abs().max() if largest is None else largest
    once = largest * torch.finfo(ours.dtype).eps / 2
    bound = times * max((theirs.double() - truth).abs().max(), once)
    assert error <= bound, f"error {error:.3e}, allowed {bound:.3e}"
