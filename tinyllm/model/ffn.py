"""The feed-forward part of a block. Dimensions: D width, F feed-forward width."""

from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm.model.sizes import ModelConfig
from tinyllm.ops import reference
from tinyllm.ops.block import is_alone, swiglu


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); Shazeer 2020, arXiv:2002.05202, eq. 6."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d, config.d_ff, bias=config.bias)
        self.up_proj = nn.Linear(config.d, config.d_ff, bias=config.bias)
        self.down_proj = nn.Linear(config.d_ff, config.d, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed x: any shape (..., D), kept."""
        multiply = swiglu if is_alone(x) else reference.swiglu
        out: Tensor = self.down_proj(multiply(self.gate_proj(x), self.up_proj(x)))
        return out


class MLP(nn.Module):
    """down(activation(up(x))), without a gate.

    gelu: x * Phi(x), Hendrycks & Gimpel 2016, arXiv:1606.08415, in the tanh form of GPT-2.
    relu2: max(x, 0)^2, So et al. 2021, arXiv:2109.08668, section 4.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.relu2 = config.ffn == "relu2"
        self.up_proj = nn.Linear(config.d, config.d_ff, bias=config.bias)
        self.down_proj = nn.Linear(config.d_ff, config.d, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed x: any shape (..., D), kept."""
        hidden = self.up_proj(x)
        active = F.relu(hidden).square() if self.relu2 else F.gelu(hidden, approximate="tanh")
        out: Tensor = self.down_proj(active)
        return out


def build_ffn(config: ModelConfig) -> SwiGLU | MLP:
    """Return a new feed-forward part."""
    return SwiGLU(config) if config.ffn == "swiglu" else MLP(config)
