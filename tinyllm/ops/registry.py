"""Which implementation of an operation runs.

Backends of an operation, fastest first: `cuda` (our CUDA C++), `cpu` (our C++), `torch` (library
calls), `reference` (plain torch). `auto` takes the first that has no objection; `TINYLLM_KERNELS`
forces one. A choice is made once per weight, not once per call, so decoding pays nothing for it.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyllm.errors import TinyllmError
from tinyllm.ops import (
    adamw8bit,
    build,
    cpu,
    cross_entropy,
    cuda,
    cuda_block_op,
    cuda_build,
    cuda_driver,
    cuda_norm_op,
    decoder,
    flash,
    library,
    reference,
)

BACKENDS = ("cuda", "cpu", "torch", "reference")


@dataclass(frozen=True, kw_only=True, slots=True)
class Implementation:
    """One backend's version of an operation."""

    backend: str
    """One of `BACKENDS`."""
    function: Callable[..., Any]
    """What runs."""
    refuses: Callable[[Any], str | None]
    """Why it cannot serve what it is asked about (a weight, an input, the sizes of attention); None
    if it can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of `tinyllm doctor`."""

    operation: str
    """Its name."""
    backend: str
    """What `auto`, or the forced choice, takes on this machine."""
    why: str
    """The reason."""


def _takes_all(subject: Any) -> str | None:
    """Object to nothing."""
    return None


def _cpu_refuses(tensor: Tensor) -> str | None:
    """Object to other devices and to machines without a built library."""
    return cpu.refuses(tensor.device)


OPERATIONS: Mapping[str, Sequence[Implementation]] = {
    "quantize_per_row": (
        Implementation(
            backend="cuda", function=cuda.quantize_per_row, refuses=cuda.refuses_quantize
        ),
        Implementation(backend="cpu", function=cpu.quantize_per_row, refuses=_cpu_refuses),
        Implementation(
            backend="reference", function=reference.quantize_per_row, refuses=_takes_all
        ),
    ),
    "linear_w8a8": (
        Implementation(backend="cuda", function=cuda.bind_linear_w8a8, refuses=cuda.refuses_linear),
        Implementation(backend="cpu", function=cpu.bind_linear_w8a8, refuses=_cpu_refuses),
        Implementation(
            backend="torch",
            function=library.bind_linear_w8a8,
            refuses=library.refuses_linear_w8a8,
        ),
        Implementation(
            backend="reference", function=reference.bind_linear_w8a8, refuses=_takes_all
        ),
    ),
    "decoder": (
        Implementation(backend="cpu", function=decoder.Decoder, refuses=_cpu_refuses),
        Implementation(backend="reference", function=decoder.no_decoder, refuses=_takes_all),
    ),
    "adamw8bit": (
        Implementation(
            backend="cuda", function=cuda.adamw8bit_step, refuses=cuda.refuses_adamw8bit
        ),
        Implementation(backend="cpu", function=adamw8bit.step, refuses=adamw8bit.refuses),
        Implementation(backend="reference", function=adamw8bit.reference_step, refuses=_takes_all),
    ),
    "cross_entropy": (
        Implementation(
            backend="cuda", function=cuda.cross_entropy, refuses=cuda.refuses_cross_entropy
        ),
        Implementation(
            backend="cpu", function=cross_entropy.cross_entropy, refuses=cross_entropy.refuses
        ),
        Implementation(backend="reference", function=reference.cross_entropy, refuses=_takes_all),
    ),
    **{
        name: (
            Implementation(backend="cuda", function=ours, refuses=refuses),
            Implementation(backend="reference", function=plain, refuses=_takes_all),
        )
        for name, ours, refuses, plain in (
            ("rms_norm", cuda_norm_op.rms_norm, cuda_norm_op.refuses, reference.rms_norm),
            ("rope", cuda_block_op.rope, cuda_block_op.refuses_rope, reference.rope),
            ("swiglu", cuda_block_op.swiglu, cuda_block_op.refuses_swiglu, reference.swiglu),
        )
    },
    "decode_attention": (
        Implementation(
            backend="cuda",
            function=cuda_block_op.decode_attention,
            refuses=cuda_block_op.refuses_decode,
        ),
        Implementation(backend="torch", function=library.decode_attention, refuses=_takes_all),
        Implementation(
            backend="reference", function=reference.decode_attention, refuses=_takes_all
        ),
    ),
    "attention": (
        Implementation(backend="cuda", function=cuda.attention, refuses=cuda.refuses_attention),
        Implementation(backend="cpu", function=flash.attention, refuses=flash.refuses),
        Implementation(backend="torch", function=library.attention, refuses=_takes_all),
        Implementation(backend="reference", function=reference.attention, refuses=_takes_all),
    ),
}
"""Every operation that has a choice, fastest first; the last one takes everything."""


def forced_backend() -> str | None:
    """Return what `TINYLLM_KERNELS` forces, None for `auto`.

    Raises:
        TinyllmError: it names no backend.
    """
    wanted = os.environ.get("TINYLLM_KERNELS", "auto")
    if wanted != "auto" and wanted not in BACKENDS:
        raise TinyllmError(f"TINYLLM_KERNELS: {wanted!r} is not one of auto, {', '.join(BACKENDS)}")
    return None if wanted == "auto" else wanted


def select(operation: str, subject: Any) -> Implementation:
    """Return the implementation for a subject: the forced one, else the fastest that takes it.

    An operation that the forced backend does not have goes to the reference.

    Raises:
        TinyllmError: the forced backend has the operation but cannot serve the subject.
    """
    implementations = OPERATIONS[operation]
    forced = forced_backend()
    for implementation in implementations[:-1]:
        if forced is None:
            if implementation.refuses(subject) is None:
                return implementation
        elif implementation.backend == forced:
            if reason := implementation.refuses(subject):
                raise TinyllmError(
                    f"TINYLLM_KERNELS={forced}: {operation} cannot run there: {reason}; unset it"
                )
            return implementation
    return implementations[-1]


def function_of(operation: str, backend: str) -> Callable[..., Any]:
    """Return a backend's version of an operation."""
    return next(each.function for each in OPERATIONS[operation] if each.backend == backend)


def why_not(operation: str, backend: str, subject: Any) -> str | None:
    """Return why a backend does not serve a subject, None if it does or has no such operation."""
    for implementation in OPERATIONS[operation]:
        if implementation.backend == backend:
            return implementation.refuses(subject)
    return None


def describe() -> list[Row]:
    """Return what runs here on CPU tensors, then on a card's, and why; never compiles or raises.

    Where a library is not built yet, its row tells what the first use will do.
    """
    try:
        forced = forced_backend()
    except TinyllmError as error:
        return [Row(operation=name, backend="none", why=str(error)) for name in OPERATIONS]
    native_obstacle, native_fact = _native_state()
    card_obstacle, card_fact = _card_state()
    obstacles = {"cpu": native_obstacle, "cuda": card_obstacle}
    rows = []
    for operation, implementations in OPERATIONS.items():
        names = [implementation.backend for implementation in implementations]
        if forced is not None:
            backend = forced if forced in names else names[-1]
            why = f"TINYLLM_KERNELS={forced}"
            why += "" if backend == forced else f", which has no {operation}"
            why += f"; {obstacles[backend]}" if obstacles.get(backend) else ""
        else:
            off = ("cuda",) if native_obstacle is None else ("cuda", "cpu")
            backend = next(name for name in names if name not in off)
            if backend == "cpu":
                why = native_fact
            elif "cpu" in names:
                why = f"no native kernels: {native_obstacle}"
            else:
                why = "no C++ of ours"
        rows.append(Row(operation=operation, backend=backend, why=why))
    if card_obstacle is not None:
        return [*rows, Row(operation="on a GPU", backend="none", why=card_obstacle)]
    return rows + ([] if forced else _card_rows(card_fact))


def _card_rows(card_fact: str) -> list[Row]:
    """Return what runs on the card's tensors where nothing is forced."""
    rows = []
    for operation, implementations in OPERATIONS.items():
        names = [each.backend for each in implementations if each.backend != "cpu"]
        why = card_fact if names[0] == "cuda" else "no CUDA kernel of ours"
        rows.append(Row(operation=f"{operation} on the GPU", backend=names[0], why=why))
    return rows


def _card_state() -> tuple[str | None, str]:
    """Return why our CUDA C++ cannot run here (None if it can) and, if it can, how it is made."""
    if reason := cuda_driver.obstacle(torch.device("cuda")):
        return reason, ""
    architecture = cuda_driver.architecture(torch.cuda.current_device())
    return None, f"CUDA C++ for {architecture}, compiled by {cuda_build.compiler().name}"


def _native_state() -> tuple[str | None, str]:
    """Return why our C++ cannot run here (None if it can) and, if it can, what it is."""
    try:
        path = build.library_path()
        if not path.exists():
            return None, f"C++, will be built at first use with {build.compiler()}"
        native, reason = cpu.load()
        if native is None:
            return reason, ""
        return None, f"C++ for {cpu.ISAS[cpu.best_isa()]}, {cpu.n_threads()} threads"
    except (build.BuildError, TinyllmError) as error:
        return str(error), ""
