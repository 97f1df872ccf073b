"""What a training run will cost, told before anything runs: parameters, FLOPs, memory, hours."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelConfig
from tinyllm.model.transformer import Transformer
from tinyllm.progress import Silent
from tinyllm.training import speed
from tinyllm.training.compiling import should_compile
from tinyllm.training.memory import MemoryNeed, blank_batch, estimate_memory, free_bytes
from tinyllm.training.params import TrainingParams
from tinyllm.training.step import Stepper

LARGEST_TRIED = 4096
RESERVE_SHARE = 0.1
"""Of the free memory, left to libraries and to what else goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is known of a run before it begins."""

    parameters: dict[str, int]
    """By part of the model, a tied matrix once."""
    flops_per_token: int
    """Forward and backward."""
    memory: MemoryNeed
    """Of one step, eager; a compiled one takes less."""
    free_bytes: int
    """Memory that is free now where the run would compute."""
    largest_batch_size: int
    """Sequences per micro-batch that fit there; 0: not even one."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Positions in all of them."""
    compiled: bool
    """Whether the run would compile."""


def make_plan(config: ModelConfig, params: TrainingParams, device: torch.device) -> Plan:
    """Return the plan of a run; nothing is computed but shapes.

    Args:
        config: the model's sizes.
        params: the run's knobs.
        device: where it would run.
    """
    with torch.device("meta"):
        model = Transformer(config)
    flops = speed.flops_per_token(model, params.seq_len)
    free = free_bytes(device)
    return Plan(
        parameters=count_by_part(model),
        flops_per_token=flops,
        memory=estimate_memory(config, params, params.batch_size),
        free_bytes=free,
        largest_batch_size=_largest_batch_size(config, params, int(free * (1 - RESERVE_SHARE))),
        steps=params.steps,
        tokens=params.tokens_per_step * params.steps,
        compiled=should_compile(params, flops, device),
    )


def count_by_part(model: Transformer) -> dict[str, int]:
    """Return the parameters of the tables, of all blocks by kind of layer, of the norms."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if words[0] != "layers":
            part = words[0]
        elif "norm" in words[-2]:
            part = "norms in blocks"
        else:
            part = {"self_attn": "attention", "mlp": "feed-forward"}.get(words[2], words[2])
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def measure_step_s(
    config: ModelConfig, params: TrainingParams, device: torch.device, budget_s: float
) -> float:
    """Return the seconds of one eager optimizer step here, from about `budget_s` seconds of them.

    A step of many micro-batches is measured with one, and multiplied.
    """
    model = build_model(config, 0).to(device).train()
    model.checkpoint = params.checkpoint
    stepper = Stepper(model, params, device, compiled=False, progress=Silent())
    batch = blank_batch(params.batch_size, params.seq_len, packed=False)
    times: list[float] = []
    end_s = time.perf_counter() + budget_s
    while time.perf_counter() < end_s or len(times) < 2:
        started_s = time.perf_counter()
        stepper.run(min(len(times), params.steps - 1), [batch])
        speed.synchronise(device)
        times.append(time.perf_counter() - started_s)
    return statistics.median(times[1:]) * params.accumulate


def describe(plan: Plan, params: TrainingParams, step_s: float | None) -> list[str]:
    """Return the plan as lines of text.

    Args:
        plan: what was found.
        params: the knobs that it was made for.
        step_s: measured time of a step; None: not measured.
    """
    total, need = sum(plan.parameters.values()), plan.memory
    lines = [f"parameters       {total / 1e6:10.2f} M"]
    lines += [f"  {part:18}{n:12,}" for part, n in plan.parameters.items()]
    lines.append(f"FLOPs per token  {plan.flops_per_token / 1e6:10.1f} M")
    lines.append(f"memory of a step {need.total / 1e6:10.0f} MB, eager; compiled less")
    named = {name: getattr(need, name) for name in need.__slots__}
    lines += [f"  {name:15}{n / 1e6:10.0f} MB" for name, n in named.items()]
    lines.append(f"free here        {plan.free_bytes / 1e6:10.0f} MB")
    least = "" if plan.largest_batch_size < LARGEST_TRIED else " or more"
    lines.append(
        f"largest batch    {plan.largest_batch_size:10d}{least} sequences of {params.seq_len}"
        f" tokens per micro-batch (batch_size: {params.batch_size})"
    )
    lines.append(
        f"steps            {plan.steps:10d} of {params.tokens_per_step} tokens,"
        f" {plan.tokens / 1e6:.1f} M tokens in all"
    )
    if step_s is None:
        return [*lines, "time                      not measured"]
    hours = step_s * plan.steps / 3600
    how = "; the run compiles, which saves about a third" if plan.compiled else ""
    lines.append(
        f"time             {hours:10.2f} h at {params.tokens_per_step / step_s:.0f} tokens/s,"
        f" eager{how}"
    )
    return lines


def _largest_batch_size(config: ModelConfig, params: TrainingParams, room: int) -> int:
    """Return how many sequences fit: beyond a few, memory grows by the same amount with each."""
    one, few, many = 1, 4, 8
    needs: Mapping[int, int] = {
        n: estimate_memory(config, params, n).total for n in (one, few, many)
    }
    if needs[few] > room:
        return one if needs[one] <= room else 0
    per_sequence = max(1, (needs[many] - needs[few]) // (many - few))
    return min(LARGEST_TRIED, few + (room - needs[few]) // per_sequence)
