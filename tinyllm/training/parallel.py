"""Several processes train one model: who they are, which rows each sees, who holds which weights.

`torchrun` starts the ranks. They stand in a grid of two axes, `data` and `tensor`:

    data     each column of ranks sees its own rows of every micro-batch. Either every rank holds
             the whole model (`ddp`), or each holds its part of every matrix and borrows the
             others' for the time it needs them (`fsdp`)
    tensor   the ranks of a row see the same rows, each with its own heads and feed-forward columns

None of it changes what is learned beyond rounding, so it is the environment's matter:
`TINYLLM_PARALLEL` (ddp, fsdp) and `TINYLLM_TP` (ranks on the tensor axis). A run by itself is a
team of one, for which everything here does nothing.
"""

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tinyllm.errors import Interrupted, TrainingError
from tinyllm.model.transformer import Transformer
from tinyllm.shards.batches import Batch
from tinyllm.training.params import TrainingParams
from tinyllm.training.rng import rng_state, set_rng_state
from tinyllm.training.tensor_parallel import split_blocks

Mode = Literal["ddp", "fsdp"]
T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another: rank 0 evaluates, samples and writes alone."""
LOST_PEER = 1
"""Exit code of a rank whose only trouble is that another one has gone."""
LOST_PEER_WORDS = ("connection closed by peer", "connection reset by peer", "broken pipe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Team:
    """The ranks of one run and how its work is divided among them."""

    rank: int = 0
    size: int = 1
    """Ranks altogether: `n_data` times `n_tensor`."""
    n_tensor: int = 1
    mode: Mode = "ddp"
    mesh: DeviceMesh | None = None
    """The grid, axes `data` and `tensor`; None: a run without torchrun."""

    @property
    def is_main(self) -> bool:
        """Return whether this rank evaluates, tells and writes."""
        return self.rank == 0

    @property
    def n_data(self) -> int:
        """Return how many parts a micro-batch has."""
        return self.size // self.n_tensor

    @property
    def splits_weights(self) -> bool:
        """Return whether a rank holds only a part of the model."""
        return self.mesh is not None and (self.mode == "fsdp" or self.n_tensor > 1)

    def describe(self) -> str:
        """Return the layout for messages and checkpoints."""
        if self.mesh is None:
            return "1 process"
        data = f"{self.mode} {self.n_data}" if self.n_data > 1 or self.n_tensor == 1 else ""
        tensor = f"tensor {self.n_tensor}" if self.n_tensor > 1 else ""
        return f"{self.size} processes, {' x '.join(filter(None, (data, tensor)))}"

    def rows(self, batch: Batch) -> Batch:
        """Return this rank's rows of a micro-batch; all ranks' together are the micro-batch.

        The order of rows is that of one process, whatever the number of ranks: ranks that do not
        divide it get one row more or less.
        """
        if self.mesh is None or self.n_data == 1:
            return batch
        rows = np.array_split(np.arange(len(batch.ids)), self.n_data)[self.rank // self.n_tensor]
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        documents = None if batch.document_ids is None else batch.document_ids[part]
        ids, targets = batch.ids[part], batch.targets[part]
        return replace(batch, ids=ids, targets=targets, document_ids=documents)

    def split(self, model: Transformer) -> Transformer:
        """Return the model to train: `model` itself, or a copy where each rank holds its part.

        The copy's blocks are split along the tensor axis now, along the data axis by `wrap_loss`.
        `model` stays whole on rank 0, for evaluation, samples and the result; the others drop it.
        """
        if not self.splits_weights:
            return model
        part = copy.deepcopy(model.to("cpu"))  # no device has to hold it whole
        if not self.is_main:
            model.to("meta")
        if self.n_tensor > 1:
            split_blocks(part, self._axis("tensor"))
        return part

    def wrap_loss(self, model: Transformer, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the loss as a function whose gradient is the mean over the data axis.

        Args:
            model: what `split` returned; with fsdp its parameters are replaced by parts.
            loss: uses `model`; called with a micro-batch.
        """
        if self.mesh is None or (self.n_data == 1 and self.mode == "ddp"):
            return loss
        module, data = _Loss(model, loss), self._axis("data")
        if self.mode == "ddp":
            return DistributedDataParallel(module, process_group=data.get_group())
        for block in model.layers:
            fully_shard(block, mesh=data)
        fully_shard(module, mesh=data)
        return module

    def gather(self, part: Transformer, whole: Transformer) -> None:
        """Copy the weights of all ranks' parts into the whole model of rank 0."""
        if part is whole:
            return
        targets = dict(whole.named_parameters())
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                if self.is_main:
                    targets[name].copy_(value)

    def adding_up(
        self, loss: Callable[..., Tensor], *, wanted: bool
    ) -> AbstractContextManager[object]:
        """Return the context of a micro-batch, after which gradients are those of all ranks.

        Args:
            loss: what `wrap_loss` returned.
            wanted: false saves ddp the sum until a later micro-batch.
        """
        if isinstance(loss, DistributedDataParallel) and not wanted:
            return loss.no_sync()
        return nullcontext()

    def sum_over_rows(self, value: Tensor) -> Tensor:
        """Return the sum of a figure over the data axis, the same on all ranks."""
        if self.mesh is not None and self.n_data > 1:
            dist.all_reduce(value, group=self._axis("data").get_group())
        return value

    def largest(self, value: int) -> int:
        """Return the largest of all ranks' values; waits for every rank, not for its GPU."""
        if self.mesh is None or self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def tell(self, value: T) -> T:
        """Return rank 0's value on every rank; a plain Python value."""
        if self.mesh is None or self.size == 1:
            return value
        told: list[Any] = [value]
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        return cast(T, told[0])

    def share_rng(self) -> None:
        """Bring every rank's random generators to where those of rank 0 are."""
        if self.mesh is not None and self.size > 1:
            set_rng_state(self.tell(rng_state()))

    def check(self, params: TrainingParams, stage: str) -> None:
        """Refuse what does not work with this layout.

        Raises:
            TrainingError: the message says what does.
        """
        if params.batch_size < self.n_data:
            raise TrainingError(
                f"{stage}.batch_size: {params.batch_size} rows are too few for {self.n_data} ranks;"
                " each needs one: raise it, lower accumulate, or start fewer"
            )
        if not self.splits_weights:
            return
        if params.optimizer == "adamw8bit":
            raise TrainingError(
                f"{stage}.optimizer: adamw8bit works on whole matrices;"
                " use TINYLLM_PARALLEL=ddp without TINYLLM_TP, or adamw or muon"
            )
        if params.precision == "fp16":
            raise TrainingError(
                f"{stage}.precision: fp16 scales the loss and needs whole gradients;"
                " use TINYLLM_PARALLEL=ddp without TINYLLM_TP, or bf16"
            )

    def _axis(self, name: str) -> DeviceMesh:
        """Return one axis of the grid."""
        assert self.mesh is not None
        return self.mesh[name]


ALONE = Team()
"""The team of a run by itself."""


class _Loss(nn.Module):
    """The loss as a module: FSDP and DDP act where a module is called.

    Everything that uses the weights is inside, the head too, so a loss may work on it directly.
    """

    def __init__(self, model: Transformer, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, ids: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
        """Return the summed loss of this rank's rows of a micro-batch."""
        return self._loss(ids, targets, documents)


@contextmanager
def open_team(device: torch.device) -> Iterator[Team]:
    """Meet the other ranks that torchrun started and yield the team; without torchrun one alone.

    Raises:
        TrainingError: the environment asks for a grid that the ranks do not fill.
        Interrupted: another rank has gone; that one, or who started it, says why.
    """
    if "RANK" not in os.environ:
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mode, n_tensor = _wanted_layout(size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gathering a matrix that both axes divide takes two steps; torch warns of it on every rank
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    try:
        # gloo beside nccl: figures that the host decides by never wait for the GPU
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=TIMEOUT)
        names = ("data", "tensor")
        mesh = init_device_mesh(device.type, (size // n_tensor, n_tensor), mesh_dim_names=names)
        yield Team(rank=rank, size=size, n_tensor=n_tensor, mode=mode, mesh=mesh)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or _is_lost_peer(error):
            raise Interrupted("", code=LOST_PEER) from error
        raise
    dist.destroy_process_group()  # not after an error: a peer that is gone would be waited for


def _wanted_layout(size: int) -> tuple[Mode, int]:
    """Return the mode and the ranks on the tensor axis that the environment asks for."""
    mode, given = os.environ.get("TINYLLM_PARALLEL", "ddp"), os.environ.get("TINYLLM_TP", "1")
    if mode not in ("ddp", "fsdp"):
        raise TrainingError(f"TINYLLM_PARALLEL: {mode!r} is not one of ddp, fsdp")
    if not given.isdecimal() or int(given) < 1 or size % int(given):
        raise TrainingError(f"TINYLLM_TP: {given!r} does not divide the {size} ranks")
    n_tensor = int(given)
    if mode == "ddp" and 1 < n_tensor < size:
        raise TrainingError(
            f"TINYLLM_PARALLEL: ddp copies whole models, TINYLLM_TP={n_tensor} splits them;"
            f" use fsdp, or TINYLLM_TP={size}"
        )
    return cast(Mode, mode), n_tensor


def _is_lost_peer(error: RuntimeError) -> bool:
    """Return whether gloo says, in a plain RuntimeError, that another process has gone."""
    return any(words in str(error).lower() for words in LOST_PEER_WORDS)
