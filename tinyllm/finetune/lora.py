"""LoRA: the weights stay, a product of two thin matrices is learned beside them.

    y = W x + (alpha / r) B A x        Hu et al. 2021, arXiv:2106.09685, section 4.1

A begins random, B zero, so that the model begins as the base. Merging adds (alpha / r) B A to W:
the result is a plain model again. Saving is the business of `adapter.py`.
Dimensions: I inputs, O outputs, r rank.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm.errors import ParamsError
from tinyllm.finetune.replay import ChatTrainingParams
from tinyllm.model.transformer import Transformer

Module = TypeVar("Module", bound=nn.Module)


class LoraShape(Protocol):
    """What an adapter looks like; `LoraParams` says what the fields mean."""

    @property
    def rank(self) -> int:
        """R."""

    @property
    def alpha(self) -> float:
        """Numerator of the scale."""

    @property
    def dropout(self) -> float:
        """Of the inputs of A."""

    @property
    def targets(self) -> Sequence[str] | None:
        """Names of layers; None: all of the blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraParams(ChatTrainingParams):
    """The `lora` section of params.yaml."""

    rank: int
    """Columns of B and rows of A."""
    alpha: float
    """The product is scaled by `alpha / rank`."""
    dropout: float
    """Share of the inputs of A that are dropped while training; 0: none."""
    targets: tuple[str, ...] | None
    """Linear layers by the last part of their name: q_proj, k_proj, v_proj, o_proj, gate_proj,
    up_proj, down_proj; an untied lm_head too. null: all of the blocks, whatever their kind."""

    def problems(self) -> list[str]:
        """Return one line per refused field."""
        problems = ChatTrainingParams.problems(self)
        if self.rank < 1:
            problems.append(f"rank: must be at least 1, got {self.rank}")
        if not 0 < self.alpha < float("inf"):
            problems.append(f"alpha: must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout: must be at least 0 and below 1, got {self.dropout}")
        if self.targets == ():
            problems.append("targets: empty; name the linear layers that LoRA adapts, or null")
        return problems


class LoRALinear(nn.Linear):
    """A linear layer with a frozen weight and a learned low-rank addition."""

    def __init__(self, base: nn.Linear, params: LoraShape, generator: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.scale = params.rank, params.alpha, params.alpha / params.rank
        self.dropout = nn.Dropout(params.dropout)
        a = torch.empty(params.rank, base.in_features).normal_(
            0, base.in_features**-0.5, generator=generator
        )
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        """(r, I); each of its outputs begins with the variance of the inputs."""
        self.lora_B = nn.Parameter(
            torch.zeros(base.out_features, params.rank, device=base.weight.device)
        )
        """(O, r)"""

    def forward(self, x: Tensor) -> Tensor:
        """Return y for x, (..., I) -> (..., O)."""
        low = F.linear(self.dropout(x), self.lora_A)
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(low, self.lora_B)

    def merged(self) -> nn.Linear:
        """Return the plain layer with the addition in its weight."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        delta = self.scale * (self.lora_B.detach() @ self.lora_A.detach())
        plain.weight, plain.bias = nn.Parameter(self.weight.detach() + delta), self.bias
        return plain


def add_lora(model: Module, params: LoraShape, seed: int) -> Module:
    """Freeze a model and put low-rank additions beside the named layers, in place; return it.

    Args:
        model: a `Transformer`, or any module with linear layers.
        params: rank, scale, dropout and targets.
        seed: of the A matrices.

    Raises:
        ParamsError: a target that names no linear layer, or a head that is tied to the embedding.
    """
    targets = params.targets
    layers = _target_layers(model, targets)
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, layer in layers:
        _replace(model, name, LoRALinear(layer, params, generator))
    return model


def merge_lora(model: Module) -> Module:
    """Put every low-rank addition into its weight, in place; return the plain model, trainable."""
    for name, layer in lora_layers(model):
        _replace(model, name, layer.merged())
    return model.requires_grad_(True)


def lora_layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """Return the layers with a low-rank addition, by name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def trainable_share(model: nn.Module) -> float:
    """Return how much of the parameters is trained, between 0 and 1."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained / sum(p.numel() for p in model.parameters())


def _target_layers(model: nn.Module, targets: Sequence[str] | None) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers whose name ends with one of the targets, or all but the head."""
    linear = dict(_linear_layers(model))
    if targets is None:
        return [(name, layer) for name, layer in linear.items() if name != "lm_head"]
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        if target not in known:
            close = difflib.get_close_matches(target, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise ParamsError(
                f"lora.targets: {target!r} names no linear layer of the model; {hint}"
            )
    if "lm_head" in targets and isinstance(model, Transformer) and model.config.tie_embeddings:
        raise ParamsError(
            "lora.targets: lm_head shares its matrix with the embedding; leave it out or train"
            " with model.tie_embeddings: false"
        )
    return [(name, layer) for name, layer in linear.items() if name.rpartition(".")[2] in targets]


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield all linear layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one with this name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
