"""INT8 and 4-bit layers that stand in for `nn.Linear` and `nn.Embedding`.

Weights have one scale per output row, those of 4 bits one per 32 of its inputs, activations one per
token; the arithmetic is that of `tinyllm.ops.linear`. Inference only. Dimensions: N outputs,
K inputs, V vocabulary, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm.ops.linear import bind_linear_w4a8, bind_linear_w8a8
from tinyllm.ops.reference import hadamard


class Prepared(nn.Module):
    """A module that keeps something made from its weights, and drops it when they change."""

    _prepared: Any = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Prepared":
        """Move or cast the weights; what was prepared is of the old ones."""
        self._prepared = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load the weights; what was prepared is of the old ones."""
        self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was prepared, which holds addresses of this process."""
        return {**self.__dict__, "_prepared": None}


class QuantizedMatrix(nn.Module):
    """Rows of whole numbers, with the scales that they are multiplied by."""

    weight_q: Tensor
    weight_scale: Tensor

    def __init__(self, weight_q: Tensor, weight_scale: Tensor) -> None:
        """Take what `tinyllm.ops` rounds to, by rows (INT8) or by groups (`tinyllm.ops.int4`)."""
        super().__init__()
        self.register_buffer("weight_q", weight_q)
        self.register_buffer("weight_scale", weight_scale)


class QuantizedLinear(Prepared, QuantizedMatrix):
    """y = x W^T without bias, on weights of 8 or 4 bits and INT8 activations."""

    def __init__(self, weight_q: Tensor, weight_scale: Tensor, *, is_rotated: bool = False) -> None:
        """Take a weight of 8 or of 4 bits.

        Args:
            weight_q: (N, K) in int8, or (N, K / 2) in uint8, two numbers in a byte.
            weight_scale: (N,) in fp32, or (N, ceil(K / 32)) in bf16.
            is_rotated: its rows were rotated by `hadamard`, so inputs have to be.
        """
        super().__init__(weight_q, weight_scale)
        self.is_rotated = is_rotated

    @property
    def bits(self) -> int:
        """Of a weight: 8 or 4."""
        return 4 if self.weight_q.dtype is torch.uint8 else 8

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, (..., N) in x's dtype, of x (..., K)."""
        if self._prepared is None:
            self._prepared = self._bind()
        y: Tensor = self._prepared(hadamard(x.float()) if self.is_rotated else x)
        return y.to(x.dtype)

    def _bind(self) -> Callable[[Tensor], Tensor]:
        """Return the weight as a function; a cast model's scales get their format back."""
        if self.bits == 4:
            return bind_linear_w4a8(self.weight_q, self.weight_scale.to(torch.bfloat16))
        return bind_linear_w8a8(self.weight_q, self.weight_scale.float())


class Int8Embedding(QuantizedMatrix):
    """Rows of an INT8 matrix (V, D), dequantised as they are looked up; scales (V,)."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows, (..., D) in the dtype of the scales."""
        return self.weight_q[ids] * self.weight_scale[ids].unsqueeze(-1)
