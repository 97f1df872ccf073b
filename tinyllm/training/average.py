"""A running mean of the weights (EMA): it lies nearer to the bottom of the valley than any step.

Polyak & Juditsky 1992; with exponential weights as Morales-Brotons et al. 2024, arXiv:2411.18704.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tinyllm.training.divided import local


class WeightAverage:
    """mean <- d mean + (1 - d) weight, with d = min(decay, (1 + step) / (10 + step)).

    The smaller d of the first steps lets the mean forget the random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters: dict[str, Tensor] = dict(trained)
        self.decay = decay
        self.means = {name: weight.detach().clone() for name, weight in trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        means = [local(mean) for mean in self.means.values()]
        weights = [local(weight) for weight in self.parameters.values()]
        torch._foreach_lerp_(means, weights, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange means and weights."""
        for name, parameter in self.parameters.items():
            weight = parameter.detach().clone()
            parameter.copy_(self.means[name])
            self.means[name].copy_(weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the means until the block ends."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def load(self, means: Mapping[str, Tensor]) -> None:
        """Take over the means of another process."""
        for name, mean in self.means.items():
            mean.copy_(means[name])
