"""Steps whose gradient is an outlier: they are skipped before they can spoil the weights.

A norm is judged by the median of the norms before it. Skipped ones count in it too: if the norms
have really risen, half a window later they are usual. Nothing is stored: the norms of all steps are
in the history, and which of them were skipped follows from them.
"""

import torch
from torch import Tensor

WINDOW = 50
"""Steps that the median is taken of."""
LEAST = 20
"""No step is judged before so many: norms fall steeply at the beginning."""


def largest_norm(norms: Tensor, step: int, factor: float) -> Tensor | None:
    """Return the largest norm that step number `step` may have, a scalar; None: any.

    Args:
        norms: (n_steps,) of all steps; those before `step` are used.
        step: index of the update.
        factor: of the median; 0: any norm will do.
    """
    if not factor or step < LEAST:
        return None
    recent = norms[max(0, step - WINDOW) : step]
    return recent.nanmedian() * factor


def count_skipped(norms: Tensor, factor: float) -> int:
    """Return how many steps of a finished run were skipped for their norm.

    An infinite norm is left out: the loss scale of fp16 is to blame for it.
    """
    limits = [largest_norm(norms, step, factor) for step in range(len(norms))]
    skipped = [
        (norms[step] > limit) & norms[step].isfinite()
        for step, limit in enumerate(limits)
        if limit is not None
    ]
    return int(torch.stack(skipped).sum()) if skipped else 0
