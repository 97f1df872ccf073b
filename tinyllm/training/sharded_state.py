"""Checkpoints of a model of which each rank holds a part: everyone writes its own.

A state is a tree of dicts. Its DTensors go to `shards/`, in the format of
torch.distributed.checkpoint, under their paths in the tree; all else stays in the tree. Read back,
each tensor is cut for the ranks that are there now, however many wrote it: a run goes on with
another number of ranks, another layout, or by itself. States of single runs are read the same way.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from tinyllm.training.divided import laid_out_like

Tree = dict[str, Any]
SHARDS = "shards"
"""Folder of the parts in a checkpoint; in a state that was read: where that folder is."""
SEPARATOR = "/"
"""Between the keys of a path; names of parameters have dots."""


def take_parts(tree: Mapping[str, Any], path: str = "") -> tuple[Tree, dict[str, DTensor]]:
    """Return a tree without its DTensors, and those by their paths."""
    rest: Tree = {}
    parts: dict[str, DTensor] = {}
    for key, value in tree.items():
        below = f"{path}{SEPARATOR}{key}" if path else key
        if isinstance(value, DTensor):
            parts[below] = value
        elif isinstance(value, Mapping):
            rest[key], inner = take_parts(value, below)
            parts |= inner
        else:
            rest[key] = value
    return rest, parts


def write_parts(folder: Path, parts: Mapping[str, DTensor]) -> None:
    """Write each rank's parts; collective, on the disk when it returns."""
    save(dict(parts), checkpoint_id=folder)


def cut_state(state: Mapping[str, Any], model: nn.Module) -> Tree:
    """Return a state that was read with every tensor divided as the model now is.

    A tensor belongs to the parameter whose name is in its path and has its shape, or to none and is
    whole everywhere.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied matrix has two names
    cut = _cut(state, parameters, None)
    if SHARDS in state:
        parts = _targets(Path(state[SHARDS]), parameters)
        with warnings.catch_warnings():  # "assuming a single process": it is one
            warnings.simplefilter("ignore", UserWarning)
            load(dict(parts), checkpoint_id=state[SHARDS], no_dist=not dist.is_initialized())
        for path, tensor in parts.items():
            _put(cut, path.split(SEPARATOR), tensor)
    return cut


def _cut(tree: Mapping[str, Any], parameters: Mapping[str, Tensor], owner: Tensor | None) -> Tree:
    """Return a tree whose tensors of divided parameters are divided."""
    cut: Tree = {}
    for key, value in tree.items():
        below = parameters.get(key, owner)
        if isinstance(value, Mapping):
            cut[key] = _cut(value, parameters, below)
        elif (
            isinstance(value, Tensor) and isinstance(below, DTensor) and value.shape == below.shape
        ):
            cut[key] = laid_out_like(value, below)
        else:
            cut[key] = value
    return cut


def _targets(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an empty tensor for every part of a checkpoint, divided as its parameter is."""
    targets: dict[str, Tensor] = {}
    for path, stored in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)  # nothing else was written
        owners = [parameters[key] for key in path.split(SEPARATOR) if key in parameters]
        owner = owners[-1] if owners else None
        dtype = stored.properties.dtype
        if owner is not None and stored.size == owner.shape:
            targets[path] = torch.zeros_like(owner, dtype=dtype, requires_grad=False)
        else:
            targets[path] = torch.zeros(stored.size, dtype=dtype)
    return targets


def _put(tree: Tree, keys: list[str], value: Tensor) -> None:
    """Put a leaf where it was in the tree, and the branches that lead there."""
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value
