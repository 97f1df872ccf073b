"""What the gradients tell beside their norm: which layer is loud, and how noisy the batch is.

Figures stay on the device until the end of the run: nothing waits for them.

Noise scale: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1. The squared norm of a
gradient over B targets is on average |G|^2 + S / B, the true gradient's and the noise's. Two batch
sizes give both: all micro-batches of a step, and its first alone. S / |G|^2 is the batch, in
targets, beyond which more tokens per step bring little.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinyllm.training.divided import total_norm

NOISE = ("noise", "signal")
"""Names of the first two figures: S and |G|^2 of one step; both are means over many to be used."""


def part_names(model: nn.Module) -> list[str]:
    """Return the parts whose norms are told: tables, every block, the final norm."""
    return list(
        dict.fromkeys(_part(name) for name, p in model.named_parameters() if p.requires_grad)
    )


def part_norms(model: nn.Module) -> Tensor:
    """Return the L2 norm of each part's gradient, in the order of `part_names`."""
    parts: dict[str, list[Tensor]] = {name: [] for name in part_names(model)}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts[_part(name)].append(parameter.grad)
    return torch.stack([total_norm(gradients) for gradients in parts.values()])


def noise_and_signal(small: Tensor, n_small: int, big: Tensor, n_big: int) -> Tensor:
    """Return estimates of S and |G|^2 from one step, (2,); not a number if both sizes are equal.

    Args:
        small: norm of the mean gradient over the first `n_small` targets.
        n_small: targets of the first micro-batch.
        big: norm of the mean gradient over all `n_big` targets.
        n_big: targets of the step.
    """
    if n_small in (0, n_big):
        return torch.full((2,), float("nan"), device=big.device)
    noise = (small.square() - big.square()) / (1 / n_small - 1 / n_big)
    signal = (n_big * big.square() - n_small * small.square()) / (n_big - n_small)
    return torch.stack([noise, signal])


def rows(figures: Tensor, parts: Sequence[str], every: int) -> list[dict[str, float | int]]:
    """Return a row per `every` steps: step, noise_scale in targets if it is known, norms of parts.

    Args:
        figures: (n_steps, 2 + n_parts); steps that were not watched hold no numbers.
        parts: names of the parts.
        every: steps per row, of which each figure is the mean.
    """
    table = []
    for start in range(0, len(figures), every):
        some = figures[start : start + every].double().cpu()
        if some[:, 2:].isnan().all():
            continue
        noise, signal, *norms = some.nanmean(0).tolist()
        row: dict[str, float | int] = {"step": start + len(some)}
        if signal > 0 and noise > 0:
            row["noise_scale"] = noise / signal
        table.append({**row, **dict(zip(parts, norms, strict=True))})
    return table


def _part(name: str) -> str:
    """Return the part of a parameter; `layers.3.mlp.up_proj.weight` belongs to `layers.3`."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "layers" else words[0]
