"""Backend `cuda`: our CUDA C++ in kernels/cuda as torch operators and functions of the registry.

The kernels' host sides (`cuda_attention`, `cuda_norm`, ...) make launches from tensors; here they
meet the card's driver. Tests put the emulator in its place, so the operators run on CPU tensors,
too. Dimensions as in `reference`.
"""

import torch
from torch import Tensor

from tinyllm.ops import cuda_attention, cuda_driver
from tinyllm.ops.attention_op import as_operator
from tinyllm.ops.flash import AttentionSizes
from tinyllm.ops.launch import Launch


def run(launch: Launch) -> None:
    """Execute a launch by whatever `cuda_driver.run` is at the time of the call."""
    cuda_driver.run(launch)


def refuses_attention(sizes: AttentionSizes) -> str | None:
    """Return why the kernels cannot serve such tensors, None if they can; compiles them."""
    heads = (sizes.dtype, sizes.width, sizes.value_width)
    if reason := cuda_attention.refuses(*heads) or cuda_driver.obstacle(sizes.device):
        return reason
    for entry, defines in cuda_attention.programs(*heads).items():
        if reason := cuda_driver.refuses(sizes.device, f"{entry}.cu", defines):
            return reason
    return None


def attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTE: Tensor,
    document_ids: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    """Do what `reference.attention` does; sums in fp32."""
    y: Tensor = cuda_flash_attention(q_BHTK, k_BGTK, v_BGTE, document_ids, window, scale)[0]
    return y


def _attention_forward(
    q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention and log-sum-exp as `as_operator` tells."""
    return cuda_attention.forward(run, q, k, v, document_ids, window, scale)


def _attention_backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    document_ids: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, the same bits in every run."""
    return cuda_attention.backward(run, d_o, q, k, v, o, lse, document_ids, window, scale)


cuda_flash_attention, cuda_flash_attention_backward = as_operator(
    "tinyllm::cuda_flash_attention", _attention_forward, _attention_backward, None
)
