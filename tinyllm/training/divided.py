"""Tensors of which each rank may hold a part: the norm of all gradients, clipping, cutting.

Gradients may be plain tensors, the same on every rank, and DTensors on different meshes, each rank
with a part. Torch's own functions take only lists of one kind.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

EPS = 1e-6
"""As in torch's clipping: a norm of zero divides nothing."""
P = TypeVar("P", bound=Tensor)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, on the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def settle(parameters: Iterable[nn.Parameter]) -> None:
    """Add up gradients that are sums still spread over ranks; after it all are like their weights.

    A weight that every rank has, used on its own heads alone, has such a gradient.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
            continue
        if gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients as one vector, the same scalar on every rank.

    The squares of parts are summed over exactly the ranks among which a gradient is divided: a copy
    counts once.
    """
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    by_axes: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for gradient in gradients:
        by_axes.setdefault(_divided_among(gradient), []).append(local(gradient))
    total = torch.zeros((), device=local(gradients[0]).device)
    for axes, parts in by_axes.items():
        square = torch.nn.utils.get_total_norm(parts).square()
        for axis in axes:
            dist.all_reduce(square, group=axis)
        total += square
    return total.sqrt()


def clip(gradients: Sequence[Tensor], largest: float, norm: Tensor) -> None:
    """Shorten the gradients in place, so that together they are no longer than `largest`.

    Pascanu et al. 2013, arXiv:1211.5063, algorithm 1.

    Args:
        gradients: all of them.
        largest: L2 norm.
        norm: what `total_norm` says.
    """
    share = torch.clamp(largest / (norm + EPS), max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], share)


def of_one_kind(parameters: Iterable[P]) -> list[list[P]]:
    """Return the parameters in lists that a fused update takes: plain, or of one mesh."""
    kinds: dict[object, list[P]] = {}
    for parameter in parameters:
        kind = parameter.device_mesh if isinstance(parameter, DTensor) else None
        kinds.setdefault(kind, []).append(parameter)
    return list(kinds.values())


def part_of(whole: Tensor, example: Tensor) -> Tensor:
    """Return this rank's part of a whole value, divided as `example` is; nothing is sent.

    A dimension that both axes divide is cut along the tensor axis first (`_StridedShard` marks the
    other one), as `fully_shard` does.
    """
    if not isinstance(example, DTensor):
        return whole
    coordinate = example.device_mesh.get_coordinate()
    assert coordinate is not None  # every rank is in every mesh of a team
    axes = sorted(
        enumerate(example.placements), key=lambda axis: isinstance(axis[1], _StridedShard)
    )
    for axis, placement in axes:
        if not isinstance(placement, Shard | _StridedShard):
            continue
        pieces = whole.chunk(example.device_mesh.size(axis), placement.dim)
        mine = coordinate[axis]
        empty = whole.narrow(placement.dim, 0, 0)  # fewer pieces than ranks: the last have none
        whole = pieces[mine] if mine < len(pieces) else empty
    return whole


def whole_of(part: Tensor, example: Tensor) -> Tensor:
    """Return the whole value of which every rank has a part, divided as `example` is."""
    return as_divided(part, example).full_tensor() if isinstance(example, DTensor) else part


def as_divided(part: Tensor, example: DTensor) -> DTensor:
    """Return the DTensor of which this rank's part is given, divided as `example` is."""
    return DTensor.from_local(
        part,
        example.device_mesh,
        example.placements,
        run_check=False,
        shape=example.shape,
        stride=example.stride(),
    )


def laid_out_like(whole: Tensor, example: Tensor) -> Tensor:
    """Return a copy of a whole value, divided as `example` is and on its device."""
    part = part_of(whole, example).to(local(example).device, copy=True).contiguous()
    return as_divided(part, example) if isinstance(example, DTensor) else part


def _divided_among(gradient: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the groups of ranks among which a settled gradient is divided; none: each has all."""
    if not isinstance(gradient, DTensor):
        return ()
    mesh = gradient.device_mesh
    divided = [axis for axis, how in enumerate(gradient.placements) if not how.is_replicate()]
    return tuple(mesh.get_group(axis) for axis in divided)
