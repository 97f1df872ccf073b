"""AdamW whose two running means are kept in 8 bits.

Same states as bitsandbytes' AdamW8bit: blocks of 256 numbers, and fp32 for small
parameters. Knows nothing about which parameters it gets.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tinyllm.ops.adamw8bit import BLOCK, Moments, Rates
from tinyllm.ops.registry import select

SMALLEST_8BIT = 4096
"""Smaller parameters keep fp32 states, as in bitsandbytes: norms are few and delicate."""


class AdamW8bit(Optimizer):
    """Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; states of arXiv:2110.02861."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(_empty_state(p))
                state["step"] += 1
                _update(p, p.grad, state, _rates(group, state["step"]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a stored state; torch turns it into the parameter's fp32, codes go back."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("m", "v"):
                if f"{name}_scale" in state:
                    state[name] = state[name].to(torch.uint8)


def _empty_state(p: Tensor) -> dict[str, Any]:
    """Return the state before the first step: all means are 0."""
    if p.numel() < SMALLEST_8BIT:
        return {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
    blocks = -(-p.numel() // BLOCK)
    codes = {
        name: torch.zeros(p.numel(), dtype=torch.uint8, device=p.device) for name in ("m", "v")
    }
    scales = {name: torch.zeros(blocks, device=p.device) for name in ("m_scale", "v_scale")}
    return {"step": 0, **codes, **scales}


def _rates(group: dict[str, Any], step: int) -> Rates:
    """Return the numbers of a group's step."""
    beta1, beta2 = group["betas"]
    return Rates(
        beta1=beta1,
        beta2=beta2,
        rate=group["lr"] / (1 - beta1**step),
        inverse2=1 / math.sqrt(1 - beta2**step),
        eps=group["eps"],
        decay=1 - group["lr"] * group["weight_decay"],
    )


def _update(p: Tensor, g: Tensor, state: dict[str, Any], rates: Rates) -> None:
    """Make one parameter's step, in 8 bits or in fp32."""
    if "m_scale" in state:
        moments = Moments(**{name: state[name] for name in ("m", "v", "m_scale", "v_scale")})
        select("adamw8bit", p).function(p, g, moments, rates)
        return
    m, v = state["m"], state["v"]
    m.mul_(rates.beta1).add_(g, alpha=1 - rates.beta1)
    v.mul_(rates.beta2).addcmul_(g, g, value=1 - rates.beta2)
    p.mul_(rates.decay)
    p.addcdiv_(m, v.sqrt().mul_(rates.inverse2).add_(rates.eps), value=-rates.rate)
