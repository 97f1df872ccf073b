"""The feed-forward part of a block: SwiGLU. Dimensions: D width, F feed-forward width."""

from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm.model.sizes import ModelConfig


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); Shazeer 2020, arXiv:2002.05202, eq. 6."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed x: any shape (..., D), kept."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
