"""Which parameter is updated by which optimizer, and with which rate and decay.

| parameter                | adamw, adamw8bit       | muon                            |
|--------------------------|------------------------|---------------------------------|
| matrices in blocks       | AdamW, decay           | Muon, decay                     |
| embedding, head          | AdamW, decay           | AdamW, decay                    |
| norms (vectors)          | AdamW, no decay        | AdamW, no decay                 |
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tinyllm.errors import TrainingError
from tinyllm.ops.registry import why_not
from tinyllm.training.adamw8bit import AdamW8bit
from tinyllm.training.divided import of_one_kind
from tinyllm.training.muon import Muon
from tinyllm.training.params import TrainingParams

VOCABULARY_LAYERS = ("embed_tokens", "embed_positions", "lm_head")
"""Their rows belong to tokens or positions, not to directions of one space: not orthogonalised."""
EPS = 1e-8


def build_optimizers(model: nn.Module, params: TrainingParams) -> list[Optimizer]:
    """Return the optimizers of all parameters that require a gradient.

    Each of their groups remembers its peak rate under `peak_lr`; `set_lr` sets the present one.

    Raises:
        TrainingError: nothing to train, or the optimizer's package is not usable.
    """
    hidden, tables, vectors = _sort_parameters(model)
    if not hidden + tables + vectors:
        raise TrainingError("no parameter of the model requires a gradient; nothing to train")
    optimizers: list[Optimizer] = []
    if params.optimizer == "muon":
        if hidden:
            optimizers.append(Muon(hidden, params.muon_lr, params.weight_decay))
        hidden = []
    groups: list[dict[str, Any]] = [
        {"params": hidden + tables, "weight_decay": params.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [
        {**group, "params": kind} for group in groups for kind in of_one_kind(group["params"])
    ]
    if groups:
        optimizers.append(_build_adamw(groups, params))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: Sequence[Optimizer], share: float) -> None:
    """Set every group's rate to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]


def optimizer_state(optimizers: Sequence[Optimizer], model: nn.Module) -> dict[str, Any]:
    """Return what the optimizers remember, by parameter.

    Torch's own form numbers the parameters group by group; how many groups there are depends on
    where the parameters are.
    """
    names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
    return {
        names[parameter]: dict(remembered)
        for optimizer in optimizers
        for parameter, remembered in optimizer.state.items()
    }


def load_optimizer_state(
    optimizers: Sequence[Optimizer], model: nn.Module, stored: Mapping[str, Any]
) -> None:
    """Take over what `optimizer_state` returned in another process."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        numbered = [names[p] for group in optimizer.param_groups for p in group["params"]]
        state = {i: dict(stored[name]) for i, name in enumerate(numbered) if name in stored}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _sort_parameters(
    model: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Return trainable matrices of blocks, of the vocabulary, and everything without two axes."""
    hidden: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim != 2:
            vectors.append(parameter)
        elif any(part in VOCABULARY_LAYERS for part in name.split(".")):
            tables.append(parameter)
        else:
            hidden.append(parameter)
    return hidden, tables, vectors


def _build_adamw(groups: list[dict[str, Any]], params: TrainingParams) -> Optimizer:
    """Return AdamW with fp32 states (one fused kernel) or with 8-bit states."""
    betas = (params.beta1, params.beta2)
    if params.optimizer != "adamw8bit":
        return torch.optim.AdamW(groups, lr=params.lr, betas=betas, eps=EPS, fused=True)
    if all(_is_served(p) for group in groups for p in group["params"]):
        return AdamW8bit(groups, lr=params.lr, betas=betas, eps=EPS)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim.adamw import AdamW8bit as AdamW8bitCuda
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"optimizer: adamw8bit: bitsandbytes does not load ({reason}); use adamw"
        ) from None
    build: Callable[..., Optimizer] = AdamW8bitCuda
    return build(groups, lr=params.lr, betas=betas, eps=EPS)


def _is_served(p: Tensor) -> bool:
    """Whether our own step with 8-bit states serves a parameter; else bitsandbytes' has to."""
    return p.device.type == "cpu" or why_not("adamw8bit", "cuda", p) is None
