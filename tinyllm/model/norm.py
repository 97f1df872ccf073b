"""RMSNorm: each vector is divided by its root mean square; there is no mean and no bias."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps); Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.

    The mean and the division are computed in fp32 whatever the dtype of x: in fp16 a single value
    of 300 already overflows the sum of squares.
    """

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised over its last dimension: any shape (..., d), dtype kept."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
