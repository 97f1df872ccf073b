"""One optimizer step: losses of the micro-batches, gradients, clipping, update.

Knows nothing about files, curves or time.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyllm.model.loss import linear_cross_entropy
from tinyllm.model.transformer import Transformer, next_token_loss
from tinyllm.progress import Progress
from tinyllm.shards.batches import IGNORED, Batch
from tinyllm.training.allocator import keep_freed_memory
from tinyllm.training.average import WeightAverage
from tinyllm.training.compiling import compile_loss, is_compile_failure
from tinyllm.training.diagnosis import noise_and_signal, part_norms
from tinyllm.training.divided import clip, settle, total_norm
from tinyllm.training.optim import (
    build_optimizers,
    load_optimizer_state,
    optimizer_state,
    set_lr,
)
from tinyllm.training.parallel import ALONE, Team
from tinyllm.training.params import TrainingParams
from tinyllm.training.precision import autocast, build_scaler, plain_attention
from tinyllm.training.schedule import lr_share
from tinyllm.training.sharded_state import cut_state

PLAIN_ATTENTION_TOKENS = 512
"""Longest sequence whose table of scores, the square of it, is cheap to keep on a CPU."""


class Stepper:
    """A model with its optimizers; `run` makes one step of it."""

    def __init__(
        self,
        model: Transformer,
        params: TrainingParams,
        device: torch.device,
        *,
        compiled: bool,
        progress: Progress,
        team: Team = ALONE,
    ) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        self.model = model
        self.params = params
        self.device = device
        self.team = team
        self.compiled = compiled
        self._progress = progress
        self._plain_pays = device.type == "cpu" and params.seq_len <= PLAIN_ATTENTION_TOKENS
        self._compute = compile_loss(self._eager_loss) if compiled else self._eager_loss
        # first of all: it may put other parameters in the place of the model's
        self._loss = team.wrap_loss(model, lambda *batch: self._compute(*batch))
        self.optimizers = build_optimizers(model, params)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.scaler = build_scaler(params.precision, device)
        decay = params.ema_decay
        self.average = WeightAverage(model, decay) if decay else None
        self.diagnosis: Tensor | None = None
        """Of the last step, if wanted: noise, signal and norms, as `tinyllm.training.diagnosis`."""

    def run(
        self, step: int, batches: Sequence[Batch], largest_norm: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Make update number `step` with the gradient of all micro-batches together.

        Args:
            step: index of the update.
            batches: its micro-batches.
            largest_norm: a gradient with a larger norm updates nothing; to know, a GPU is waited
                for. None: any gradient will do, and nothing waits.

        Returns:
            The loss in nats per token before the update and the gradient's L2 norm before clipping,
            two scalars on the device.
        """
        set_lr(self.optimizers, lr_share(step, self.params))
        try:
            loss = self._backward(batches)
        except Exception as error:
            if not self.compiled or not is_compile_failure(error):
                raise
            self._fall_back(error)
            loss = self._backward(batches)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = self._norm()
        if self.params.diagnostics:
            self._diagnose(norm)
        if largest_norm is None or bool(norm <= largest_norm):
            self._clip(norm)
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        if self.average is not None:
            self.average.update(step)
        return loss, norm

    def averaged(self) -> AbstractContextManager[None]:
        """Return the context in which the model has the weights that will be saved."""
        return nullcontext() if self.average is None else self.average.applied()

    def use_average(self) -> None:
        """Give the model the weights that are saved; no step may follow."""
        if self.average is not None:
            self.average.swap()

    def state(self) -> dict[str, Any]:
        """Return all that shapes the next step, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizers, self.model),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.means,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned in another process."""
        state = cut_state(state, self.model)
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.optimizers, self.model, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load(state["average"])

    def _backward(self, batches: Sequence[Batch]) -> Tensor:
        """Add up the gradients; the loss is divided by the targets of all micro-batches.

        Dividing each by its own count would weigh a token by how few its neighbours are. Each rank
        of a team has its rows only and divides by all targets too; gradients are then averaged over
        the ranks, hence the factor.
        """
        counts = [int((batch.targets != IGNORED).sum()) for batch in batches]
        n_targets = max(1, sum(counts))
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(map(self.team.rows, batches)):
            documents = None if batch.document_ids is None else self._move(batch.document_ids)
            watched = i == 0 and self.params.diagnostics
            with self.team.adding_up(self._loss, wanted=watched or i == len(batches) - 1):
                with plain_attention(wanted=self.compiled and self._plain_pays):
                    loss = self._loss(self._move(batch.ids), self._move(batch.targets), documents)
                loss = loss / n_targets
                torch.autograd.backward(self.scaler.scale(loss * self.team.n_data))
            total += loss.detach()
            if watched:
                self._first = (self._norm() / self.scaler.scale(total.new_ones(())), counts[0])
        self._n_targets = n_targets
        return self.team.sum_over_rows(total)

    def _eager_loss(self, ids: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
        """Return the summed loss of one micro-batch, without the logits of all its positions."""
        head = self.model.lm_head
        with autocast(self.params.precision, self.device):
            x = self.model.hidden(ids, document_ids=documents)
            if type(head) is nn.Linear:
                return linear_cross_entropy(x.flatten(0, 1), head.weight, targets.flatten())
            return next_token_loss(self.model.head(x), targets)  # a head with a LoRA adapter

    def _norm(self) -> Tensor:
        """Return the L2 norm of the whole gradient."""
        settle(self.trained)
        return total_norm(self._gradients())

    def _clip(self, norm: Tensor) -> None:
        """Shorten a gradient of this norm to `clip_norm`."""
        if self.params.clip_norm:
            clip(self._gradients(), self.params.clip_norm, norm)

    def _gradients(self) -> list[Tensor]:
        """Return the gradients that there are."""
        return [parameter.grad for parameter in self.trained if parameter.grad is not None]

    def _diagnose(self, norm: Tensor) -> None:
        """Note what `tinyllm.training.diagnosis` tells about the gradient, before it is clipped."""
        first, n_first = self._first
        share = n_first / self._n_targets  # the first gradient was divided by all targets
        both = noise_and_signal(first / max(share, 1e-12), n_first, norm, self._n_targets)
        self.diagnosis = torch.cat([both, part_norms(self.model)])

    def _move(self, array: np.ndarray) -> Tensor:
        """Return a batch's array on the device, without waiting for the copy."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":  # only from pinned memory the copy runs by itself
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _fall_back(self, error: Exception) -> None:
        """Go on without the compiler; nothing has been updated yet."""
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        self._progress.say(f"torch.compile does not work here, going on without it: {reason[:200]}")
        self.compiled, self._compute = False, self._eager_loss
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
