"""Backend `cuda`: our CUDA C++ in kernels/cuda as torch operators and functions of the registry.

The kernels' host sides (`cuda_attention`, `cuda_norm`, ...) make launches from tensors; here they
meet the card's driver. Tests put the emulator in its place, so the operators run on CPU tensors,
too. Dimensions as in `reference`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tinyllm.ops import (
    cuda_adamw8bit,
    cuda_attention,
    cuda_cross_entropy,
    cuda_driver,
    cuda_hopper,
    cuda_int8,
)
from tinyllm.ops.adamw8bit import Moments, Rates
from tinyllm.ops.attention_op import as_operator, without_lse
from tinyllm.ops.cuda_rows import FORMATS, VECTOR_BYTES, format_define
from tinyllm.ops.flash import AttentionSizes
from tinyllm.ops.launch import Launch


def run(launch: Launch) -> None:
    """Execute a launch by whatever `cuda_driver.run` is at the time of the call."""
    if cuda_hopper.is_wanted() and cuda_hopper.refuses(launch) is None:
        launch = cuda_hopper.of(launch)
    cuda_driver.run(launch)


def refuses_attention(sizes: AttentionSizes) -> str | None:
    """Return why the kernels cannot serve such tensors, None if they can; compiles them."""
    heads = (sizes.dtype, sizes.width, sizes.value_width)
    if reason := cuda_attention.refuses(*heads) or cuda_driver.obstacle(sizes.device):
        return reason
    roomy = cuda_attention.is_roomy(sizes.device)
    for entry, defines in cuda_attention.programs(*heads, roomy=roomy).items():
        if reason := cuda_driver.refuses(sizes.device, f"{entry}.cu", defines):
            return reason
    return None


cuda_flash_attention, cuda_flash_attention_backward = as_operator(
    "tinyllm::cuda_flash_attention",
    functools.partial(cuda_attention.forward, run),
    functools.partial(cuda_attention.backward, run),
    None,
)
attention = without_lse(cuda_flash_attention)
"""Does what `reference.attention` does; sums in fp32."""


def refuses_quantize(x: Tensor) -> str | None:
    """Return why `quantize_per_row` cannot serve x, (..., K), None if it can; compiles it."""
    if reason := cuda_int8.refuses_quantize(x) or cuda_driver.obstacle(x.device):
        return reason
    return cuda_driver.refuses(x.device, "quantize.cu", format_define(x.dtype))


def quantize_per_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `reference.quantize_per_row` does, equal in every bit."""
    q, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    return q.view(x.shape), scale.view(x.shape[:-1])


@torch.library.custom_op("tinyllm::cuda_quantize_rows", mutates_args=())
def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Return `reference.quantize_per_row` of rows."""
    return cuda_int8.quantize_per_row(run, aligned(x_MK))


@quantize_rows.register_fake
def _quantize_rows_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tell the compiler the shapes of the results."""
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def refuses_linear(weight_q: Tensor) -> str | None:
    """Return why a weight (N, K) cannot be served, None if it can; compiles what serves bf16."""
    k = weight_q.shape[1]
    if k % VECTOR_BYTES:
        return f"K = {k} is not a multiple of {VECTOR_BYTES}"
    widest = weight_q.new_empty((0, k + -k % cuda_int8.STEP), dtype=torch.float32)
    if reason := cuda_int8.refuses_quantize(widest) or cuda_driver.obstacle(weight_q.device):
        return reason
    for source in ("quantize.cu", "linear_w8a8.cu", "linear_w8a16.cu"):
        defines = format_define(torch.bfloat16)
        if reason := cuda_driver.refuses(weight_q.device, source, defines):
            return reason
    return None


def bind_linear_w8a8(weight_q: Tensor, weight_scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Pack a weight; return what `reference.bind_linear_w8a8` returns, equal in every bit.

    But for up to 8 rows in bf16 or fp16, as in decoding: there the weight's bytes are the whole
    cost, so the activations are not quantised, and the result is nearer to the float layer.
    """
    weight = cuda_int8.pack(weight_q, weight_scale)
    n, k = weight_q.shape

    def linear(x: Tensor) -> Tensor:
        """Return (..., N) in x's dtype of x (..., K)."""
        rows = (x if x.dtype in FORMATS else x.float()).reshape(-1, k)
        y: Tensor = linear_int8(rows, weight.packed, weight.scale, n, k)
        return y.view(*x.shape[:-1], n).to(x.dtype)

    return linear


@torch.library.custom_op("tinyllm::cuda_linear_int8", mutates_args=())
def linear_int8(
    x_MK: Tensor, packed: Tensor, scale: Tensor, n_outputs: int, n_inputs: int
) -> Tensor:
    """Return x W^T, (M, N) in x's format, of rows and a weight of `cuda_int8.pack`."""
    weight = cuda_int8.PackedWeight(
        packed=packed, scale=scale, n_outputs=n_outputs, n_inputs=n_inputs
    )
    few = len(x_MK) <= cuda_int8.MAX_W8A16_ROWS and x_MK.dtype != torch.float32
    multiply = cuda_int8.linear_w8a16 if few else cuda_int8.linear_w8a8
    return multiply(run, aligned(x_MK), weight)


@linear_int8.register_fake
def _linear_int8_fake(
    x: Tensor, packed: Tensor, scale: Tensor, n_outputs: int, n_inputs: int
) -> Tensor:
    """Tell the compiler the shape of the result."""
    return x.new_empty((x.shape[0], n_outputs))


def refuses_cross_entropy(logits_NV: Tensor) -> str | None:
    """Return why the kernel cannot serve such logits, None if it can; compiles it."""
    device = logits_NV.device
    if reason := cuda_cross_entropy.refuses(logits_NV) or cuda_driver.obstacle(device):
        return reason
    return cuda_driver.refuses(device, cuda_cross_entropy.SOURCE, format_define(logits_NV.dtype))


@torch.library.custom_op("tinyllm::cuda_cross_entropy", mutates_args=())
def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `reference.cross_entropy` does; a target of V or more makes its loss NaN."""
    return cuda_cross_entropy.cross_entropy(run, aligned(logits_NV), targets_N.contiguous())


@cross_entropy.register_fake
def _cross_entropy_fake(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Tell the compiler the shapes of the results."""
    loss = logits.new_empty(targets.shape, dtype=torch.float32)
    return loss, logits.new_empty(logits.shape)


def refuses_adamw8bit(p: Tensor) -> str | None:
    """Return why the kernel cannot serve a parameter, None if it can; compiles it."""
    if reason := cuda_adamw8bit.refuses(p) or cuda_driver.obstacle(p.device):
        return reason
    return cuda_driver.refuses(p.device, cuda_adamw8bit.SOURCE)


def adamw8bit_step(p: Tensor, g: Tensor, moments: Moments, rates: Rates) -> None:
    """Do what `adamw8bit.reference_step` does, equal in every bit."""
    cuda_adamw8bit.step(run, p, g, moments, rates)


def aligned(x: Tensor) -> Tensor:
    """Return x so that kernels can read it by whole vectors; a copy where it lies otherwise.

    Within operators only: the compiler knows no addresses.
    """
    whole = x.is_contiguous() and x.data_ptr() % VECTOR_BYTES == 0
    return x if whole else x.clone(memory_format=torch.contiguous_format)
