"""What a run remembers about its steps; it lives in the checkpoint, and files are made from it.

Losses and norms stay on the device until somebody looks, so that a GPU never waits for the log.
"""

import time
from typing import Any

import torch
from torch import Tensor

from tinyllm.training import diagnosis, speed, spikes
from tinyllm.training.params import TrainingParams
from tinyllm.training.schedule import lr_share


class History:
    """Loss, gradient norm and time of every step; evaluations; samples."""

    def __init__(self, params: TrainingParams, device: torch.device, parts: list[str]) -> None:
        self.params = params
        self.parts = parts
        """Names of what has a gradient norm of its own."""
        self.device = device
        self.losses = torch.zeros(params.steps, device=device)
        self.norms = torch.zeros(params.steps, device=device)
        self.seconds = torch.zeros(params.steps)
        n_figures = len(diagnosis.NOISE) + len(parts)
        n_rows = params.steps if params.diagnostics else 0
        self.diagnoses = torch.full((n_rows, n_figures), float("nan"), device=device)
        self.evaluations: list[dict[str, float | int]] = []
        self.samples: list[dict[str, Any]] = []
        self._looked_at = 0
        self._started_s = time.perf_counter()

    def add(self, step: int, loss: Tensor, norm: Tensor, figures: Tensor | None = None) -> None:
        """Remember one step's figures without waiting for them."""
        self.losses[step] = loss
        self.norms[step] = norm
        if figures is not None:
            self.diagnoses[step] = figures

    def look(self, done: int) -> int | None:
        """Wait for the steps up to `done` and time them together.

        Returns:
            The index of the first step among them whose loss is not finite, or None. Without loss
            scaling, whose business that is, a gradient that is not finite counts too.
        """
        since = slice(self._looked_at, done)
        fine = self.losses[since].isfinite()
        if self.params.precision != "fp16":
            fine &= self.norms[since].isfinite()
        good: list[bool] = fine.tolist()  # waits
        now = time.perf_counter()
        if good:
            self.seconds[since] = (now - self._started_s) / len(good)
        first, self._started_s, self._looked_at = self._looked_at, now, done
        return None if all(good) else first + good.index(False)

    def restart_clock(self) -> None:
        """Leave out of the next step's time what has happened since the last look."""
        self._started_s = time.perf_counter()

    def add_evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Remember the figures of an evaluation after `step` steps."""
        self.evaluations.append({"step": step, **figures})

    def add_sample(self, step: int, text: str) -> None:
        """Remember a text written after `step` steps."""
        self.samples.append({"step": step, "text": text})

    def recent_loss(self, done: int) -> float:
        """Return the mean loss of the last `log_every` steps, in nats per token."""
        return float(self.losses[max(0, done - self.params.log_every) : done].mean())

    def last_loss(self) -> float:
        """Return the mean loss of the last tenth of the run's steps, in nats per token."""
        steps = self.params.steps
        return float(self.losses[steps - max(1, steps // 10) :].double().mean())

    def last_step_s(self, done: int) -> float:
        """Return the time of the last step in seconds."""
        return max(float(self.seconds[done - 1]), 1e-9)

    def median_step_s(self) -> float:
        """Return the median time of a step in seconds."""
        return max(speed.median_step_s(self.seconds.tolist()), 1e-9)

    def total_s(self) -> float:
        """Return the time of all steps in seconds, evaluations and samples left out."""
        return float(self.seconds.double().sum())

    def curve(self) -> list[dict[str, float | int]]:
        """Return a row per `log_every` steps, with the evaluation made there, if any.

        `train_loss` and `grad_norm` are means over the steps since the row before; the row of step
        0 has those of the first batch.
        """
        losses, norms = self.losses.double().cpu(), self.norms.double().cpu()
        rows: dict[int, dict[str, float | int]] = {
            0: {  # what the first step saw before it changed anything
                "step": 0,
                "train_loss": float(losses[0]),
                "grad_norm": float(norms[0]),
                "lr_share": 0.0,
            }
        }
        every, steps = self.params.log_every, self.params.steps
        for start in range(0, steps, every):
            end = min(start + every, steps)
            rows[end] = {
                "step": end,
                "train_loss": float(losses[start:end].mean()),
                "grad_norm": float(norms[start:end].mean()),
                "lr_share": lr_share(end - 1, self.params),
            }
        for evaluation in self.evaluations:
            step = int(evaluation["step"])
            rows[step] = {**rows.get(step, {}), **evaluation}
        return [rows[step] for step in sorted(rows)]

    def gradients(self) -> list[dict[str, float | int]]:
        """Return a row per `log_every` steps about the gradients, if they were watched."""
        return diagnosis.rows(self.diagnoses, self.parts, self.params.log_every)

    def n_skipped(self) -> int:
        """Return how many steps were skipped because their gradient was an outlier."""
        return spikes.count_skipped(self.norms, self.params.spike_factor)

    def state(self) -> dict[str, Any]:
        """Return everything, as tensors and plain values."""
        return {
            "losses": self.losses,
            "norms": self.norms,
            "seconds": self.seconds,
            "diagnoses": self.diagnoses,
            "evaluations": self.evaluations,
            "samples": self.samples,
            "looked_at": self._looked_at,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned in another process."""
        self.losses = state["losses"].to(self.device)
        self.norms = state["norms"].to(self.device)
        self.seconds = state["seconds"]
        self.evaluations, self.samples = state["evaluations"], state["samples"]
        if len(state["diagnoses"]) == len(self.diagnoses):  # else the knob was turned meanwhile
            self.diagnoses = state["diagnoses"].to(self.device)
        self._looked_at = state["looked_at"]
        self.restart_clock()
