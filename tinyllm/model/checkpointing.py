"""Which activations a block keeps for its backward pass; the rest is computed again there.

| mode      | kept per block                              | computed again                    |
|-----------|---------------------------------------------|-----------------------------------|
| none      | every intermediate result                   | nothing                           |
| blocks    | its input                                   | the whole block                   |
| selective | its input, outputs of products and attention | norms, RoPE, SiLU, sums, casts    |

Chen et al. 2016, arXiv:1604.06174; selective: Korthikanti et al. 2022, arXiv:2205.05198, section 5.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Checkpoint = Literal["none", "blocks", "selective"]

_PRODUCTS = ("mm", "addmm")
"""Not `bmm`: attention in the open would keep its table of scores, the square of the sequence."""


def run_block(block: Callable[..., Tensor], mode: Checkpoint, *args: Any) -> Tensor:
    """Return `block(*args)`, keeping for the backward pass what the mode says."""
    if mode == "none" or not torch.is_grad_enabled():
        return block(*args)
    kind: dict[str, Any] = {}
    if mode == "selective":
        kind["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    result: Tensor = checkpoint(block, *args, use_reentrant=False, **kind)
    return result


def _policy(context: object, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return whether an operator's output is kept: it is dear, and small for its price."""
    name = operator.__name__.partition(".")[0]  # `mm.default`
    dear = name in _PRODUCTS or "attention" in name
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
