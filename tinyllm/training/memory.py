"""How much memory a training step will take, found by rehearsing it with tensors without content.

The real step runs on fake tensors, which have shapes and formats but no bytes, and every buffer
that it would hold is counted while it would be held. So there is no formula per architecture to
keep true. Not counted: the process itself and what libraries set aside for their own work. A
compiled step keeps less than this, an eager one this much.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tinyllm.errors import TrainingError
from tinyllm.model.sizes import ModelConfig
from tinyllm.model.transformer import Transformer
from tinyllm.progress import Silent
from tinyllm.shards.batches import Batch
from tinyllm.training.params import TrainingParams
from tinyllm.training.step import Stepper

STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256}
"""Per parameter: two fp32 means, or two of one byte with an fp32 scale per block of 256."""
ENOUGH_LAYERS = 3
"""Every further block adds what the third one added."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeed:
    """Bytes of one training process, by what they are for."""

    weights: int
    """fp32, and their running mean if there is one."""
    gradients: int
    """fp32."""
    optimizer: int
    """States of all optimizers."""
    activations: int
    """The most that is held beyond those three during forward, backward and update."""

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.gradients + self.optimizer + self.activations


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage from its making to its end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        """Count a storage that is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        """Uncount a storage."""
        self._known.discard(key)
        self.now -= size


def estimate_memory(
    config: ModelConfig, params: TrainingParams, batch_size: int, *, packed: bool = False
) -> MemoryNeed:
    """Return what one step of a new model would hold at its peak.

    Args:
        config: the model's sizes.
        params: the run's knobs.
        batch_size: sequences per micro-batch, in place of that of the knobs.
        packed: several documents share a row.
    """

    def rehearse(n_layers: int) -> MemoryNeed:
        """Return what the model would hold with so many layers."""
        model = Transformer(replace(config, n_layers=n_layers))
        return _rehearse(model, params, batch_size, packed=packed)

    with FakeTensorMode():
        if config.n_layers <= ENOUGH_LAYERS:
            return rehearse(config.n_layers)
        short, shorter = rehearse(ENOUGH_LAYERS), rehearse(ENOUGH_LAYERS - 1)
    more = config.n_layers - ENOUGH_LAYERS
    counted = {}
    for field in fields(MemoryNeed):
        at, before = getattr(short, field.name), getattr(shorter, field.name)
        counted[field.name] = at + more * (at - before)
    return MemoryNeed(**counted)


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free now, on the card or in this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def require_memory(
    model: Transformer, params: TrainingParams, device: torch.device, stage: str, *, packed: bool
) -> None:
    """Refuse a run that would not fit into the free memory.

    A generous bound settles most cases; the rehearsal takes seconds.

    Raises:
        TrainingError: gives both numbers and what to do.
    """
    config, tokens = model.config, params.seq_len * params.batch_size
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    held = device.type == "cuda" and 4 * n_parameters  # the weights are there already
    free = free_bytes(device) + int(held)
    per_token = 32 * config.d + 8 * config.d_ff + 4 * config.n_heads * params.seq_len
    bound = 24 * n_parameters + 4 * config.n_layers * tokens * per_token + 8 * tokens * config.d
    if bound < free:
        return
    need = estimate_memory(config, params, params.batch_size, packed=packed).total
    if need > free:
        raise TrainingError(
            f"{stage}: a step needs about {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are"
            f" free; lower {stage}.batch_size and raise accumulate, or set checkpoint: blocks"
        )


def _rehearse(
    model: Transformer, params: TrainingParams, batch_size: int, *, packed: bool
) -> MemoryNeed:
    """Return what one step of a model of fake tensors holds."""
    kind = params.optimizer
    plain = replace(
        params,
        optimizer="adamw" if kind == "adamw8bit" else kind,  # its code is not torch's
        precision="bf16" if params.precision == "fp16" else params.precision,  # no loss scale
        diagnostics=False,
    )
    model.train().checkpoint = params.checkpoint
    stepper = Stepper(model, plain, torch.device("cpu"), compiled=False, progress=Silent())
    # the first step makes the optimizers' states
    stepper.run(0, [blank_batch(1, 2, packed=packed)])
    held = [*model.parameters(), *model.buffers()]
    held += [] if stepper.average is None else list(stepper.average.means.values())
    weights = _bytes(held)
    states = [o.state.values() for o in stepper.optimizers]
    optimizer = _bytes([t for each in states for state in each for t in state.values()])
    gradients = _bytes(stepper.trained)
    micro = [blank_batch(batch_size, params.seq_len, packed=packed)] * min(2, params.accumulate)
    with _Watcher() as watcher:
        stepper.run(1, micro)
    if kind == "adamw8bit":
        optimizer = int(optimizer * STATE_BYTES[kind] / STATE_BYTES["adamw"])
    return MemoryNeed(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=max(0, watcher.peak - gradients),
    )


def blank_batch(rows: int, columns: int, *, packed: bool) -> Batch:
    """Return a batch whose content does not matter."""
    ids = np.zeros((rows, columns), dtype=np.int64)
    return Batch(ids=ids, targets=ids, document_ids=ids if packed else None)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the size of the tensors' storages together."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
