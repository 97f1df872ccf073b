"""What keeps the scale of vectors: RMSNorm (no mean, no bias) and LayerNorm."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm.model.sizes import ModelConfig
from tinyllm.ops import reference
from tinyllm.ops.block import is_alone, rms_norm


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps); Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.

    The mean and the division are computed in fp32 whatever the dtype of x: in fp16 a single value
    of 300 already overflows the sum of squares.
    """

    fp16_safe = False
    """Compute in x's own dtype by `fp16_safe_rms_norm`: for runtimes that have nothing wider."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised over its last dimension: any shape (..., d), dtype kept."""
        if self.fp16_safe:
            return fp16_safe_rms_norm(x, self.weight, self.eps)
        normed = rms_norm if is_alone(x) else reference.rms_norm
        return normed(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """y = weight * (x - mean) / sqrt(variance + eps) + bias, in fp32 inside, as RMSNorm.

    Ba et al. 2016, arXiv:1607.06450, eq. 4.
    """

    def __init__(self, d: int, eps: float, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised over its last dimension: any shape (..., d), dtype kept."""
        bias = None if self.bias is None else self.bias.float()
        normed = F.layer_norm(x.float(), self.weight.shape, self.weight.float(), bias, self.eps)
        return normed.to(x.dtype)


def build_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """Return a new norm of the residual stream."""
    if config.norm == "layernorm":
        return LayerNorm(config.d, config.norm_eps, bias=config.bias)
    return RMSNorm(config.d, config.norm_eps)


def fp16_safe_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMSNorm of x, (..., d), without leaving its dtype.

    x is divided by its largest magnitude first, so no square exceeds 1 and their mean cannot
    overflow; only if that is above 1, because small vectors and zeros need no help. eps shrinks
    with the squares.
    """
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1)
    y = x / scale
    mean = y.square().mean(-1, keepdim=True)
    return weight.to(x.dtype) * (y * torch.rsqrt(mean + eps / scale / scale))


def make_fp16_safe(model: nn.Module) -> nn.Module:
    """Let every RMSNorm of a model compute in its input's dtype, in place; return the model."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.fp16_safe = True
    return model
