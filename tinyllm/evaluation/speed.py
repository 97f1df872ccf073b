"""Tokens per second, time to the first token, memory: several models in interleaved rounds.

Medians of rounds, after a warm-up; the spread is the middle half of the rounds over the median.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyllm.errors import ParamsError
from tinyllm.evaluation.loss import TokenSplit, evaluate_stream
from tinyllm.evaluation.runners import OpenRunner, Runner
from tinyllm.evaluation.workers import Worker
from tinyllm.progress import Progress

BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkParams:
    """The `benchmark` section of params.yaml."""

    prompt_tokens: int
    """Tokens of the prompt."""
    decode_tokens: int
    """Tokens made with the cache, one pass each."""
    decode_no_cache_tokens: int
    """Tokens made without it: each is a pass over everything before, so fewer."""
    warmup_rounds: int
    """Rounds that do not count."""
    rounds: int
    """Rounds that count; every model is measured once in each."""
    eval_tokens: int | None
    """Held-out tokens for val_bpb, from the start; null: all."""
    eval_seq_len: int
    """Tokens per window of that."""

    def __post_init__(self) -> None:
        """Refuse counts that measure nothing."""
        least = {
            "prompt_tokens": 1,
            "decode_tokens": 1,
            "decode_no_cache_tokens": 1,
            "warmup_rounds": 0,
            "rounds": 1,
            "eval_tokens": 2,
            "eval_seq_len": 1,
        }
        values = {name: getattr(self, name) for name in least}
        problems = [
            f"{name}: must be at least {least[name]}, got {value}"
            for name, value in values.items()
            if value is not None and value < least[name]
        ]
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model to measure."""

    open: OpenRunner
    """Opens it in its own process."""
    file: Path | None
    """The file whose size counts; None: it exists in memory only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """The times of one round, in seconds."""

    prefill_s: float
    """Prompt to first token, keys and values kept."""
    prefill_no_cache_s: float
    """The same, nothing kept."""
    decode_s: float
    """All tokens with the cache."""
    decode_no_cache_s: float
    """All tokens without it."""


def time_round(
    runner: Runner, prompt: Sequence[int], n_decode: int, n_decode_no_cache: int
) -> Round:
    """Time one round; both ways of decoding start behind the prompt.

    One pass goes before, untimed: the models measured since have emptied the processor's caches.
    """
    runner.decode(runner.prefill(prompt))
    started_s = time.perf_counter()
    token = runner.prefill(prompt)
    prefilled_s = time.perf_counter()
    for _ in range(n_decode):
        token = runner.decode(token)
    decoded_s = time.perf_counter()
    ids = [*prompt, runner.full(prompt)]
    full_s = time.perf_counter()
    for _ in range(n_decode_no_cache):
        ids.append(runner.full(ids))
    ended_s = time.perf_counter()
    return Round(
        prefill_s=prefilled_s - started_s,
        prefill_no_cache_s=full_s - decoded_s,
        decode_s=decoded_s - prefilled_s,
        decode_no_cache_s=ended_s - full_s,
    )


def measure_speed(
    subjects: Mapping[str, Subject],
    prompt: Sequence[int],
    split: TokenSplit,
    params: BenchmarkParams,
    *,
    n_threads: int,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Measure every model; nothing else should run meanwhile.

    Args:
        subjects: by name.
        prompt: `params.prompt_tokens` token ids.
        split: held-out tokens for val_bpb.
        params: how much.
        n_threads: of each process; they never compute at the same time.
        progress: told after every round.

    Returns:
        Metrics by name and model.
    """
    rounds: dict[str, list[Round]] = {name: [] for name in subjects}
    counts = (params.decode_tokens, params.decode_no_cache_tokens)
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(subject.open, n_threads))
            for name, subject in subjects.items()
        }
        before = {name: worker.opened().memory_before_bytes for name, worker in workers.items()}
        for i in range(params.warmup_rounds + params.rounds):
            for name, worker in workers.items():
                taken = worker.ask(time_round, list(prompt), *counts)
                if i >= params.warmup_rounds:
                    rounds[name].append(taken)
            progress.step("rounds", i + 1, params.warmup_rounds + params.rounds)
        metrics = {}
        for name, worker in workers.items():
            peak = worker.peak_memory_bytes()
            loss = worker.ask(_evaluate, split, params.eval_seq_len)
            metrics[name] = {
                **summarise(rounds[name], len(prompt), *counts),
                "peak_memory_bytes": peak,
                "model_memory_bytes": peak - before[name],
                "val_bpb": loss.val_bpb,
            }
            if (file := subjects[name].file) is not None:
                metrics[name]["file_bytes"] = file.stat().st_size
            progress.step("val_bpb", len(metrics), len(subjects))
    return metrics


def summarise(
    rounds: Sequence[Round], n_prompt: int, n_decode: int, n_decode_no_cache: int
) -> dict[str, float]:
    """Return medians and spreads of the rounds as metrics.

    Args:
        rounds: at least one.
        n_prompt: tokens of the prompt.
        n_decode: tokens of `decode_s`.
        n_decode_no_cache: tokens of `decode_no_cache_s`.
    """
    n_tokens = {
        "prefill": n_prompt,
        "prefill_no_cache": n_prompt,
        "decode": n_decode,
        "decode_no_cache": n_decode_no_cache,
    }
    times = [asdict(taken) for taken in rounds]
    metrics: dict[str, float] = {}
    for name, n in n_tokens.items():
        seconds = [taken[f"{name}_s"] for taken in times]
        metrics[f"{name}_tokens_per_s"] = _digits(n / statistics.median(seconds))
        metrics[f"{name}_spread_share"] = _digits(spread(seconds))
    first_s = statistics.median(taken.prefill_s for taken in rounds)
    return metrics | {"first_token_ms": _digits(1000 * first_s)}


def spread(values: Sequence[float]) -> float:
    """Return the middle half's width over the median; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def check_fits(params: BenchmarkParams, max_seq_len: int) -> None:
    """Refuse sequences that the models do not take.

    Raises:
        ParamsError: prompt and answer, or a window, are longer than the context.
    """
    needed = params.prompt_tokens + max(params.decode_tokens, params.decode_no_cache_tokens)
    if needed > max_seq_len:
        raise ParamsError(
            f"benchmark.prompt_tokens: {params.prompt_tokens} and {needed - params.prompt_tokens}"
            f" new tokens do not fit into model.max_seq_len {max_seq_len}; make one of them smaller"
        )
    if params.eval_seq_len > max_seq_len:
        raise ParamsError(
            f"benchmark.eval_seq_len: {params.eval_seq_len} is longer than model.max_seq_len"
            f" {max_seq_len}"
        )


def _digits(value: float) -> float:
    """Return the four digits of a measured value that mean something."""
    return float(f"{value:.4g}")


def _evaluate(runner: Runner, split: TokenSplit, seq_len: int) -> Any:
    """Return the loss of a split; fp32 means: as the weights are."""
    return evaluate_stream(
        runner, split, seq_len=seq_len, batch_tokens=BATCH_TOKENS, precision="fp32"
    )
