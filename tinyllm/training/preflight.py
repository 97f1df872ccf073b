"""The mistakes that cost a night, looked for in the first seconds.

Everything happens on a copy of the model and draws no random number: the run that follows is the
same, bit for bit. Each finding is one line that says what to do.
"""

import copy
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from tinyllm.errors import TrainingError
from tinyllm.model.transformer import Transformer, next_token_loss
from tinyllm.shards.batches import IGNORED, Batch
from tinyllm.training.memory import require_memory
from tinyllm.training.params import TrainingParams
from tinyllm.training.precision import autocast

FRESH_NATS = 1.0
"""How far the first loss may be from ln V. A tied head of width 4096 begins 0.8 above it."""
OVERFIT_STEPS, OVERFIT_RATE, OVERFIT_TOKENS = 6, 2e-3, 256
"""Sign descent: needs no state and no tuning, each step moves every weight by the rate."""
TOO_FAST = 4
"""After a step that raised the loss it is taken back and the rate divided by this: the wider a
model, the more a layer's output moves. Width 768 after 20 steps of pretraining needed it."""
OVERFIT_SHARE = 0.97
"""The loss on one row must fall below this share of what it was; the shipped one halves it.

Of a model that is broken it does not move, of one of 20 thousand weights it falls little."""
KNOWN_NATS = 0.1
"""A row with a smaller loss is known already."""


def preflight(
    model: Transformer,
    params: TrainingParams,
    batch: Batch,
    device: torch.device,
    *,
    stage: str,
    fresh: bool,
    whole: bool,
) -> None:
    """Look at the first micro-batch and what the model makes of it.

    Args:
        model: on its device, before the first step.
        params: the run's knobs.
        batch: the first micro-batch.
        device: where the run computes.
        stage: begins the messages.
        fresh: the weights are untrained: every token must be about equally likely.
        whole: this process will hold the whole model, so that its memory can be foretold.

    Raises:
        TrainingError: the run would be in vain or would not fit.
    """
    check_shift(batch, stage)
    if whole:
        require_memory(model, params, device, stage, packed=batch.document_ids is not None)
    row = _one_row(batch, device)
    if row is None:
        raise TrainingError(f"{stage}: the first batch has no target; look at the masks")
    if fresh:
        check_first_loss(_mean_loss(model, params, row, device), model.config.vocab_size, stage)
    check_overfit(model, params, row, device, stage)


def check_shift(batch: Batch, stage: str) -> None:
    """Refuse targets that are not the inputs shifted by one.

    Raises:
        TrainingError: says how far they are shifted, if that can be seen.
    """
    shares = {shift: _agreement(batch, shift) for shift in (1, 0, 2)}
    if shares[1] == 1.0:
        return
    found = {0: "not shifted", 2: "shifted twice"}
    how = next((found[n] for n in found if shares[n] == 1.0), "not the inputs shifted by one")
    raise TrainingError(
        f"{stage}: the targets are {how}; target t must be token t + 1, and only the batch shifts"
    )


def check_first_loss(loss: float, vocab_size: int, stage: str) -> None:
    """Refuse an untrained model that is far from ln V.

    Raises:
        TrainingError: gives both numbers.
    """
    if not abs(loss - math.log(vocab_size)) <= FRESH_NATS:
        raise TrainingError(
            f"{stage}: the first loss is {loss:.2f}, a new model of {vocab_size} tokens must begin"
            f" near ln V = {math.log(vocab_size):.2f}; look at how weights are initialised"
        )


def check_overfit(
    model: Transformer,
    params: TrainingParams,
    row: tuple[Tensor, Tensor, Tensor | None],
    device: torch.device,
    stage: str,
) -> None:
    """Refuse a model that cannot learn even one row by heart; tried on a copy.

    Raises:
        TrainingError: the loss does not fall.
    """
    pupil = copy.deepcopy(model).eval()  # evaluation mode: dropout would draw random numbers
    pupil.checkpoint = "none"
    learnt = [parameter for parameter in pupil.parameters() if parameter.requires_grad]
    before = best = _mean_loss(pupil, params, row, device)
    if before < KNOWN_NATS:
        return
    rate = OVERFIT_RATE
    for _ in range(OVERFIT_STEPS):
        with torch.enable_grad():
            loss = _loss(pupil, params, row, device)
            gradients = torch.autograd.grad(loss, learnt, allow_unused=True)
        _move(learnt, gradients, -rate)
        after = _mean_loss(pupil, params, row, device)
        if after < best:
            best = after
        else:
            _move(learnt, gradients, rate)
            rate /= TOO_FAST
    if not best < OVERFIT_SHARE * before:
        raise TrainingError(
            f"{stage}: the model does not learn one row by heart, its loss went from {before:.2f}"
            f" to {best:.2f} in {OVERFIT_STEPS} steps; look for detached gradients, frozen layers"
            " or wrong masks (preflight: false goes on regardless)"
        )


@torch.no_grad()
def _move(weights: list[Parameter], gradients: tuple[Tensor | None, ...], rate: float) -> None:
    """Add the rate to every weight whose gradient is positive, subtract it where it is negative."""
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            weight.add_(gradient.sign(), alpha=rate)


def _agreement(batch: Batch, shift: int) -> float:
    """Return the share of targets that are the input so many places further in the document."""
    length = batch.ids.shape[1] - shift
    targets, inputs = batch.targets[:, :length], batch.ids[:, shift:]
    judged = targets != IGNORED
    if batch.document_ids is not None:
        judged &= batch.document_ids[:, :length] == batch.document_ids[:, shift:]
    return float((targets == inputs)[judged].mean()) if judged.any() else 1.0


def _one_row(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return the part with targets of the row with most of them, on the device."""
    row = int((batch.targets != IGNORED).sum(1).argmax())
    places = np.flatnonzero(batch.targets[row] != IGNORED)
    if not len(places):
        return None
    start = max(0, min(int(places[0]), batch.ids.shape[1] - OVERFIT_TOKENS))
    part = slice(row, row + 1), slice(start, start + OVERFIT_TOKENS)
    ids, targets = (torch.from_numpy(a[part].copy()).to(device) for a in (batch.ids, batch.targets))
    documents = batch.document_ids
    if documents is None:
        return ids, targets, None
    return ids, targets, torch.from_numpy(documents[part].copy()).to(device)


def _loss(
    model: Transformer,
    params: TrainingParams,
    row: tuple[Tensor, Tensor, Tensor | None],
    device: torch.device,
) -> Tensor:
    """Return the summed loss of a row."""
    ids, targets, documents = row
    with autocast(params.precision, device):
        return next_token_loss(model(ids, document_ids=documents), targets)


@torch.no_grad()
def _mean_loss(
    model: Transformer,
    params: TrainingParams,
    row: tuple[Tensor, Tensor, Tensor | None],
    device: torch.device,
) -> float:
    """Return the loss of a row in nats per token."""
    was_training = model.training
    model.eval()
    loss = float(_loss(model, params, row, device)) / int((row[1] != IGNORED).sum())
    model.train(was_training)
    return loss
