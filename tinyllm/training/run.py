"""One training run: plain steps, and what happens now and then: log, evaluate, sample, save."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tinyllm.errors import Interrupted, TrainingError
from tinyllm.model.init import count_parameters
from tinyllm.model.transformer import Transformer
from tinyllm.progress import Progress
from tinyllm.shards.batches import Batches
from tinyllm.training import speed
from tinyllm.training.compiling import should_compile
from tinyllm.training.diagnosis import part_names
from tinyllm.training.history import History
from tinyllm.training.parallel import Team
from tinyllm.training.params import TrainingParams
from tinyllm.training.precision import DTYPES
from tinyllm.training.preflight import preflight
from tinyllm.training.rng import rng_state, set_rng_state
from tinyllm.training.spikes import largest_norm
from tinyllm.training.state import State, Store
from tinyllm.training.step import Stepper
from tinyllm.training.stop import Watch

Evaluate = Callable[[Transformer], dict[str, float]]
Sample = Callable[[Transformer], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a finished run has to tell; the model itself was trained in place."""

    curve: list[dict[str, float | int]]
    """A row per `log_every` steps: step, train_loss, grad_norm, lr_share, evaluations."""
    gradients: list[dict[str, float | int]]
    """Likewise: step, noise_scale, the gradient norm of each part; empty unless asked for."""
    samples: list[dict[str, Any]]
    """`{"step": ..., "text": ...}`, from before the first step to after the last."""
    metrics: dict[str, float | int]
    """Numbers about the whole run; a unit ends each name."""


class Run:
    """One run between its first and its last step."""

    def __init__(
        self,
        model: Transformer,
        params: TrainingParams,
        batches: Batches,
        evaluate: Evaluate,
        sample: Sample | None,
        stage: str,
        device: torch.device,
        store: Store,
        progress: Progress,
        team: Team,
    ) -> None:
        self.model, self.params, self.batches = model, params, batches
        self.evaluate, self.sample, self.team = evaluate, sample, team
        self.stage, self.device, self.store, self.progress = stage, device, store, progress
        self.flops_per_token = speed.flops_per_token(model, params.seq_len)
        self.history = History(params, device, part_names(model))
        self.step = 0
        self.peak_memory_bytes = 0

    def begin(self, stored: State | None, threads: int, *, fresh: bool) -> None:
        """Build what makes steps and bring it to where the stored state ends."""
        if stored is None and self.params.preflight and self.team.is_main:
            self._preflight(fresh=fresh)
        wanted = should_compile(self.params, self.flops_per_token, self.device)
        compiled = wanted if stored is None else stored["compiled"]
        compiled = compiled and not self.team.splits_weights
        self.model.checkpoint = self.params.checkpoint
        self.threads = threads
        self.stepper = Stepper(
            self.team.split(self.model).to(self.device).train(),
            self.params,
            self.device,
            compiled=compiled,
            progress=self.progress,
            team=self.team,
        )
        how = "compiled (the first step takes half a minute)" if compiled else "eager"
        self.progress.say(
            f"{self.stage}: {self.params.precision} on {self.device}, {self.team.describe()},"
            f" {threads} threads, {how}"
        )
        if stored is None:
            self._evaluate_and_sample(first=True)
            return
        began = (stored["device"], stored["team"], stored["threads"])
        if began != (self.device.type, self.team.describe(), threads):
            self.progress.say(
                f"{self.stage}: began on {began[0]}, {began[1]}, {began[2]} threads;"
                " the last bits may differ from an undisturbed run"
            )
        self.stepper.load_state(stored)
        self.history.load_state(stored["history"])
        set_rng_state(stored["rng"])
        self.step, self.peak_memory_bytes = stored["step"], stored["peak_memory_bytes"]

    def finish(self, watching: Watch) -> None:
        """Make all steps that are left."""
        while self.step < self.params.steps:
            if watching.should_stop():
                self._leave(watching)
            self._advance()
            last = self.step == self.params.steps
            self._evaluate_and_sample()
            if last or _is_due(self.step, self.params.save_every):
                self._save()

    def collect(self) -> None:
        """Bring the trained weights into the model that was given, on rank 0."""
        self.team.gather(self.stepper.model, self.model)

    def result(self) -> TrainResult:
        """Return the curve, the samples and the metrics of the finished run."""
        tokens_per_s = self.params.tokens_per_step / self.history.median_step_s()
        peak = speed.peak_flops_per_s(DTYPES[self.params.precision], self.device) * self.team.size
        return TrainResult(
            curve=self.history.curve(),
            gradients=self.history.gradients(),
            samples=self.history.samples,
            metrics={
                "steps_done": self.params.steps,
                "skipped_steps": self.history.n_skipped(),
                "train_loss": self.history.last_loss(),
                "tokens": self.params.tokens_per_step * self.params.steps,
                "tokens_per_s": tokens_per_s,
                "mfu": self.flops_per_token * tokens_per_s / peak,
                "peak_memory_bytes": self.peak_memory_bytes,
                "seconds": self.history.total_s(),
                "parameters": count_parameters(self.model),
                "compiled": int(self.stepper.compiled),
            },
        )

    def _preflight(self, *, fresh: bool) -> None:
        """Look for what would waste the run, on its first micro-batch."""
        share = replace(self.params, batch_size=-(-self.params.batch_size // self.team.n_data))
        preflight(
            self.model.to(self.device),
            share,
            self.batches.batch(0),
            self.device,
            stage=self.stage,
            fresh=fresh,
            whole=not self.team.splits_weights,
        )

    def _advance(self) -> None:
        """Make one step; look at its figures when that does not make a GPU wait."""
        first = self.step * self.params.accumulate
        micro = [self.batches.batch(first + i) for i in range(self.params.accumulate)]
        limit = largest_norm(self.history.norms, self.step, self.params.spike_factor)
        loss, norm = self.stepper.run(self.step, micro, limit)
        self.history.add(self.step, loss, norm, self.stepper.diagnosis)
        self.step += 1
        if self.device.type == "cpu" or self._is_anything_due():
            self._look()

    def _is_anything_due(self) -> bool:
        """Return whether this step is logged, evaluated, sampled or saved."""
        params = self.params
        every = (params.log_every, params.eval_every, params.sample_every, params.save_every)
        return self.step == params.steps or any(_is_due(self.step, n) for n in every)

    def _look(self) -> None:
        """Read the figures of the steps since the last look.

        Raises:
            TrainingError: a loss among them is not finite; nothing after it was saved.
        """
        bad = self.history.look(self.step)
        if bad is not None:
            kept = self.store.last_step
            good = "there is none yet" if kept is None else f"it is kept at step {kept}"
            raise TrainingError(
                f"{self.stage}: the loss is not finite at step {bad + 1} of {self.params.steps};"
                f" last good checkpoint: {good}; lower lr or muon_lr, raise warmup_steps,"
                " or set clip_norm to 1"
            )
        figures = {"loss": self.history.recent_loss(self.step)}
        figures["tokens_per_s"] = self.params.tokens_per_step / self.history.last_step_s(self.step)
        self.progress.step(self.stage, self.step, self.params.steps, **figures)

    def _evaluate_and_sample(self, *, first: bool = False) -> None:
        """Evaluate and sample if it is time to: first, now and then, last."""
        edge = first or self.step == self.params.steps
        evaluate = edge or _is_due(self.step, self.params.eval_every)
        sample = self.sample is not None and (edge or _is_due(self.step, self.params.sample_every))
        if not evaluate and not sample:
            return
        with torch.no_grad(), self.stepper.averaged():
            self.collect()
            if self.team.is_main:
                self.model.to(self.device).eval()
                if evaluate:
                    self.history.add_evaluation(self.step, self.evaluate(self.model))
                if sample and self.sample is not None:
                    self.history.add_sample(self.step, self.sample(self.model))
                self.model.train()
                if self.team.splits_weights:
                    self.model.to("cpu")  # room for the steps
        self.team.share_rng()
        self.history.restart_clock()

    def _save(self) -> None:
        """Store everything that a resumed run needs."""
        now = speed.peak_memory_bytes(self.device)
        self.peak_memory_bytes = max(self.peak_memory_bytes, now)
        self.store.save(
            {
                "step": self.step,
                **self.stepper.state(),
                "history": self.history.state(),
                "rng": rng_state(),
                "compiled": self.stepper.compiled,
                "threads": self.threads,
                "device": self.device.type,
                "team": self.team.describe(),
                "peak_memory_bytes": self.peak_memory_bytes,
            }
        )
        self.history.restart_clock()

    def _leave(self, watching: Watch) -> None:
        """Save and stop."""
        if self.step > 0:
            self._look()
        self._save()
        saved = "nothing is saved" if self.store.last_step is None else "run again to go on"
        raise Interrupted(
            f"{self.stage}: {watching.reason}: stopped at step {self.step},"
            f" last checkpoint: {self.store.last_step or 0}; {saved}",
            code=watching.code,
        )


def _is_due(step: int, every: int) -> bool:
    """Return whether something that happens every so many steps happens now; 0: never."""
    return every > 0 and step % every == 0
