"""Muon: momentum whose matrices are made nearly orthogonal before they are applied.

Every singular value of the update becomes about 1, so rare directions learn as fast as common ones.
Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. For hidden matrices only: embedding,
head and norms belong to AdamW. Matrices of equal shape are orthogonalised together, as one batch.
Of a matrix divided among ranks everyone gathers the whole and keeps its part of the update.

The price is products of the matrices with themselves, whatever the batch: about
iterations * width / tokens per step of the model's own work, much for a small batch on a CPU. So we
take three iterations with the best polynomials for them instead of Jordan's five with one: on our
corpus (d = 128, 400 steps) the loss was the same, 4.599 against 4.600; two gave 4.702.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tinyllm.training.divided import local, part_of, whole_of

MOMENTUM = 0.95
POLYNOMIALS = (
    (8.093369, -23.62043, 17.446152),
    (3.636586, -2.721927, 0.536546),
    (2.6613, -1.977155, 0.452616),
)
"""Coefficients of a x + b x^3 + c x^5 for each iteration.

Together they bring every x of [0.01, 1] to 1 +- 0.27, the least possible with three quintics: each
is the best approximation of 1 on the interval that the one before leaves (Amsel et al. 2025,
arXiv:2505.16932, theorem 3.1). `tests/training/test_muon.py` computes them anew.
"""
EPS = 1e-7


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, decoupled weight decay.

    The update of a (rows, columns) matrix is scaled by sqrt(max(1, rows / columns)), as in Jordan's
    own code: changes of the output are then of about the same size whatever the shape.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient; there is no closure."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape together."""
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        momenta = [local(self._momentum(p)) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's look ahead
        whole = [whole_of(part, p) for part, p in zip(ahead, parameters, strict=True)]
        updates = orthogonalise(torch.stack(whole)).to(parameters[0].dtype)
        rows, columns = parameters[0].shape
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        weights = [local(p) for p in parameters]
        mine = [part_of(update, p) for update, p in zip(updates, parameters, strict=True)]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, mine, alpha=-rate)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Return the running mean of a parameter's gradients."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        return momentum


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return each matrix with its singular values pushed towards 1, in bf16.

    X <- a X + (b A + c A^2) X with A = X X^T applies a x + b x^3 + c x^5 to every singular value.
    They must not exceed 1: X is first divided by ||X X^T||^(1/2), the 4-norm of the singular
    values. That is nearer to the largest than the usual ||X||, their 2-norm, and costs nothing, as
    A is needed anyhow; one iteration is saved (Boissin et al. 2025, arXiv:2512.04632, with another
    bound).

    Args:
        matrices: (n, rows, columns).

    Returns:
        (n, rows, columns).
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    X = (matrices.mT if tall else matrices).contiguous()  # wide: A is the smaller Gram matrix
    X = (X / (torch.linalg.matrix_norm(X, keepdim=True) + EPS)).bfloat16()
    A = X @ X.mT
    bound = torch.linalg.matrix_norm(A.float(), keepdim=True).sqrt() * 1.01 + EPS  # 1.01: bf16
    X, A = X / bound.bfloat16(), A / (bound * bound).bfloat16()
    for i, (a, b, c) in enumerate(POLYNOMIALS):
        if i:
            A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X
