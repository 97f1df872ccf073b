"""Where a run computes, with how many threads, and in which number format.

What does not change what is learned comes from the environment: `TINYLLM_DEVICE` (auto, cpu, cuda,
cuda:1) and `TINYLLM_THREADS` (CPU threads; unset: as many as torch takes).
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyllm.errors import TrainingError
from tinyllm.training.params import Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device() -> torch.device:
    """Return the device that `TINYLLM_DEVICE` names; auto and unset mean CUDA if there is one.

    Each rank that torchrun started takes the CUDA device of its own number.

    Raises:
        TrainingError: the name is no device, or there is no such device here.
    """
    name = os.environ.get("TINYLLM_DEVICE", "auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise TrainingError(f"TINYLLM_DEVICE: {name!r} is not one of auto, cpu, cuda, cuda:<n>")
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise TrainingError(
            f"TINYLLM_DEVICE: {device}: torch sees {torch.cuda.device_count()} CUDA devices;"
            " use cpu"
        )
    return device


def use_threads() -> int:
    """Set the CPU threads that `TINYLLM_THREADS` asks for; return the number in use.

    Unset, the ranks that torchrun started share those that torch takes.

    Raises:
        TrainingError: it is not a positive number.
    """
    given = os.environ.get("TINYLLM_THREADS")
    if given:
        if not given.isdecimal() or int(given) < 1:
            raise TrainingError(f"TINYLLM_THREADS: {given!r} is not a number of threads")
        torch.set_num_threads(int(given))
    elif "LOCAL_WORLD_SIZE" in os.environ:
        n_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, torch.get_num_threads() // n_ranks))
    return torch.get_num_threads()


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which matrix products run in the given format; weights stay fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


@contextmanager
def plain_attention(*, wanted: bool) -> Iterator[None]:
    """Let attention be products and a softmax, in the format of its inputs, if wanted.

    The compiler fuses that. torch's attention kernel for CPUs is not faster than its fp32 form in
    bf16; at 256 tokens a compiled step without it took 0.85 of the time (478 against 566 ms, 2
    cores with AVX512-BF16), the losses agreed to four digits over 30 steps.
    """
    if not wanted:
        yield
        return
    # this switch is for every device; without it the products would be fp32
    switch = torch.backends.cuda
    before = switch.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    switch.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        switch.allow_fp16_bf16_reduction_math_sdp(before)


def build_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler: it works for fp16, whose gradients underflow, and else does nothing.

    Micikevicius et al. 2017, arXiv:1710.03740, section 3.2.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
