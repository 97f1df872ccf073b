"""Every knob of a training run; pretraining, SFT and LoRA share them."""

from dataclasses import dataclass
from typing import Literal

from tinyllm.model.checkpointing import Checkpoint

Optimizer = Literal["adamw", "adamw8bit", "muon"]
Schedule = Literal["cosine", "wsd"]
Precision = Literal["fp32", "bf16", "fp16"]
Compile = Literal["auto", "on", "off"]

NOT_TRAJECTORY = (
    "diagnostics",
    "preflight",
    "log_every",
    "eval_every",
    "sample_every",
    "save_every",
)
"""Fields that change what is told and stored, never the weights: a run resumes across them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingParams:
    """A training section of params.yaml."""

    steps: int
    """Optimizer steps."""
    seq_len: int
    """Tokens per sequence."""
    batch_size: int
    """Sequences per micro-batch."""
    accumulate: int
    """Micro-batches per optimizer step; the gradient is that of one batch of all their tokens."""
    optimizer: Optimizer
    """`muon` is for matrices inside the blocks; embedding, head and norms then get AdamW."""
    lr: float
    """AdamW's peak learning rate."""
    muon_lr: float
    """Muon's peak learning rate; no effect with another optimizer."""
    weight_decay: float
    """Decoupled, on matrices only; 0: off."""
    beta1: float
    """AdamW's decay of the mean of gradients; Muon's momentum is its own constant."""
    beta2: float
    """AdamW's decay of the mean of squared gradients."""
    schedule: Schedule
    """After the warm-up: a cosine, or a constant and then a line down (WSD)."""
    warmup_steps: int
    """Steps over which the rate rises linearly to its peak; 0: none."""
    decay_share: float
    """WSD: the last share of the steps, over which the rate falls; no effect with cosine."""
    min_lr_share: float
    """The rate that the schedule falls to, as a share of the peak."""
    clip_norm: float
    """Largest L2 norm of all gradients together; 0: no clipping."""
    precision: Precision
    """Of activations and products; weights and optimizer states stay fp32. fp16 scales the loss."""
    compile: Compile
    """`torch.compile`: `auto` compiles when the run is long enough to win the time back."""
    checkpoint: Checkpoint
    """What blocks keep for the backward pass: everything, their input, or the dear outputs too."""
    ema_decay: float
    """Decay of the running mean of weights, evaluated and saved in their place; 0: off."""
    spike_factor: float
    """A step whose gradient norm is above this many times the recent median is skipped; 0: off."""
    diagnostics: bool
    """Norm of every layer's gradient and the noise scale, in gradients.tsv."""
    preflight: bool
    """Look for common mistakes before the first step."""
    log_every: int
    """Steps per row of the curve."""
    eval_every: int
    """Steps between evaluations; 0: only before the first and after the last."""
    sample_every: int
    """Steps between text samples; 0: only before the first and after the last."""
    save_every: int
    """Steps between checkpoints; 0: only when stopped and after the last."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if problems := self.problems():
            raise ValueError("\n".join(problems))

    def problems(self) -> list[str]:
        """Return one line per refused field, beginning with its name; subclasses add theirs."""
        least = {"steps": 1, "seq_len": 1, "batch_size": 1, "accumulate": 1, "log_every": 1}
        least |= {"warmup_steps": 0, "eval_every": 0, "sample_every": 0, "save_every": 0}
        least |= {"weight_decay": 0, "clip_norm": 0, "spike_factor": 0}
        problems = [
            f"{name}: must be at least {low}, got {getattr(self, name)}"
            for name, low in least.items()
            if not getattr(self, name) >= low
        ]
        problems += [
            f"{name}: must be above 0, got {getattr(self, name)}"
            for name in ("lr", "muon_lr")
            if not 0 < getattr(self, name) < float("inf")
        ]
        problems += [
            f"{name}: must be at least 0 and below 1, got {getattr(self, name)}"
            for name in ("beta1", "beta2", "ema_decay")
            if not 0 <= getattr(self, name) < 1
        ]
        problems += [
            f"{name}: a share, must be from 0 to 1, got {getattr(self, name)}"
            for name in ("decay_share", "min_lr_share")
            if not 0 <= getattr(self, name) <= 1
        ]
        if 0 < self.spike_factor <= 1:
            problems.append(
                f"spike_factor: {self.spike_factor} would skip half of all steps;"
                " take about 3 or more, 0 is off"
            )
        if 0 < self.steps < self.warmup_steps:
            problems.append(
                f"warmup_steps: {self.warmup_steps} is more than steps = {self.steps};"
                " the rate would never reach its peak"
            )
        return problems

    @property
    def tokens_per_step(self) -> int:
        """Positions of one optimizer step, ignored targets included."""
        return self.seq_len * self.batch_size * self.accumulate


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainParams(TrainingParams):
    """The `pretrain` section of params.yaml."""

    mask_documents: bool
    """Documents in one sequence do not see each other, and each counts its positions from 0."""
