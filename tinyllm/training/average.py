"""A running mean of the weights (EMA): it lies nearer to the bottom of the valley than any step.

Polyak & Juditsky 1992; with exponential weights as Morales-Brotons et al. 2024, arXiv:2411.18704.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """mean <- d mean + (1 - d) weight, with d = min(decay, (1 + step) / (10 + step)).

    The smaller d of the first steps lets the mean forget the random start.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.decay = decay
        self.means = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.means, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange means and weights."""
        for parameter, mean in zip(self.parameters, self.means, strict=True):
            weight = parameter.detach().clone()
            parameter.copy_(mean)
            mean.copy_(weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the means until the block ends."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def load(self, means: Sequence[Tensor]) -> None:
        """Take over the means of another process."""
        for mean, stored in zip(self.means, means, strict=True):
            mean.copy_(stored)
