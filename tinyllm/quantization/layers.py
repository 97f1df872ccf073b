"""INT8 layers that stand in for `nn.Linear` and `nn.Embedding`.

Weights have one scale per output row, activations one per token; the arithmetic is that of
`tinyllm.ops.linear`. Inference only. Dimensions: N outputs, K inputs, V vocabulary, D width.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tinyllm.ops.linear import bind_linear_w8a8
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


class Int8Linear(Prepared):
    """y = x W^T without bias, on INT8 weights and activations."""

    weight_q: Tensor
    weight_scale: Tensor

    def __init__(self, weight_q: Tensor, weight_scale: Tensor) -> None:
        """Take INT8 weights (N, K) and fp32 scales (N,)."""
        super().__init__()
        self.register_buffer("weight_q", weight_q)
        self.register_buffer("weight_scale", weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, (..., N) in x's dtype, of x (..., K)."""
        if self._prepared is None:
            self._prepared = bind_linear_w8a8(self.weight_q, self.weight_scale.float())
        y: Tensor = self._prepared(x)
        return y


class RotatedInt8Linear(Int8Linear):
    """The same for a weight whose rows are rotated by `hadamard`, as its inputs are here."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, (..., N) in x's dtype, of x (..., K)."""
        return super().forward(hadamard(x.float())).to(x.dtype)


class Int8Embedding(nn.Module):
    """Rows of an INT8 matrix, dequantised as they are looked up."""

    weight_q: Tensor
    weight_scale: Tensor

    def __init__(self, weight_q: Tensor, weight_scale: Tensor) -> None:
        """Take INT8 rows (V, D) and fp32 scales (V,)."""
        super().__init__()
        self.register_buffer("weight_q", weight_q)
        self.register_buffer("weight_scale", weight_scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows, (..., D) in the dtype of the scales."""
        return self.weight_q[ids] * self.weight_scale[ids].unsqueeze(-1)
