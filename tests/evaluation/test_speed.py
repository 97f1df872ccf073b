import statistics
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from tiny_dirs import VOCAB_SIZE, write_model_dir

from tinyllm.errors import ArtifactError, ParamsError
from tinyllm.evaluation.hardware import fingerprint, peak_memory_bytes
from tinyllm.evaluation.loss import TokenPart, evaluate_stream
from tinyllm.evaluation.runners import TorchRunner
from tinyllm.evaluation.speed import (
    BenchmarkParams,
    Round,
    Subject,
    check_fits,
    measure_speed,
    spread,
    summarise,
    time_round,
)
from tinyllm.evaluation.workers import Worker
from tinyllm.inference.generate import generate
from tinyllm.inference.sampling import SamplingParams
from tinyllm.progress import Silent
from tinyllm.quantization.load import load_any_model
from tinyllm.shards.stream import TokenStream

PROMPT = [7, 30, 99, 12]
COUNTS = {
    "prompt_tokens": 4,
    "decode_tokens": 8,
    "decode_no_cache_tokens": 4,
    "warmup_rounds": 1,
    "rounds": 2,
    "eval_tokens": None,
    "eval_seq_len": 16,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model_dir(tmp_path_factory.mktemp("models") / "sft")


def some_tokens() -> TokenPart:
    ids = np.random.default_rng(0).integers(6, VOCAB_SIZE, 70).astype(np.uint16)
    return TokenPart(stream=TokenStream([ids]), n_bytes=200)


@pytest.mark.parametrize("kind", ["sft", "int8"])
def test_a_runner_says_what_generate_says_with_and_without_cache(tmp_path, kind):
    directory = write_model_dir(tmp_path / kind, kind)
    expected = list(
        generate(load_any_model(directory), PROMPT, SamplingParams(max_new_tokens=9), ())
    )
    runner = TorchRunner.open(directory, None, "cpu")
    for _ in range(2):  # a second prefill starts anew
        cached = [runner.prefill(PROMPT)]
        while len(cached) < 9:
            cached.append(runner.decode(cached[-1]))
        assert cached == expected
    uncached = []
    while len(uncached) < 9:
        uncached.append(runner.full([*PROMPT, *uncached]))
    assert uncached == expected


def test_bf16_rounds_the_weights_and_not_the_positions(model_dir):
    runner = TorchRunner.open(model_dir, torch.bfloat16, "cpu")
    assert {p.dtype for p in runner._model.parameters()} == {torch.bfloat16}
    assert runner.rope_cos.dtype == torch.float32
    assert runner(torch.tensor([PROMPT])).dtype == torch.bfloat16


class Clocked:
    """A runner whose every call moves a clock by a known time."""

    rope_cos = torch.zeros(())

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.calls = clock, []

    def prefill(self, ids):
        self.calls.append(("prefill", len(ids)))
        self.clock[0] += 1.0
        return 5

    def decode(self, token):
        self.clock[0] += 0.25
        return 5

    def full(self, ids):
        self.calls.append(("full", len(ids)))
        self.clock[0] += 0.5 * len(ids)
        return 5


def test_a_round_times_what_its_names_say(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    runner = Clocked(clock)
    taken = time_round(runner, PROMPT, 3, 2)
    assert asdict(taken) == {
        "prefill_s": 1.0,
        "decode_s": 0.75,
        "prefill_no_cache_s": 2.0,
        "decode_no_cache_s": 0.5 * (5 + 6),
    }
    assert runner.calls == [("prefill", 4), ("prefill", 4), ("full", 4), ("full", 5), ("full", 6)]


def test_medians_and_spreads():
    rounds = [
        Round(prefill_s=s, prefill_no_cache_s=2 * s, decode_s=3 * s, decode_no_cache_s=4 * s)
        for s in (0.1, 0.2, 0.3, 0.4, 9.0)
    ]
    metrics = summarise(rounds, 30, 60, 6)
    assert metrics["prefill_tokens_per_s"] == 100
    assert metrics["first_token_ms"] == 300
    assert metrics["prefill_no_cache_tokens_per_s"] == 50
    assert metrics["decode_tokens_per_s"] == pytest.approx(60 / 0.9, rel=1e-3)
    assert metrics["decode_no_cache_tokens_per_s"] == 5
    assert metrics["decode_spread_share"] == pytest.approx(0.2 / 0.3, rel=1e-3)
    assert (spread([1.0]), spread([2.0, 2.0])) == (0, 0)
    values = list(np.random.default_rng(0).random(9))
    low, high = np.quantile(values, [0.25, 0.75])
    assert spread(values) == pytest.approx((high - low) / statistics.median(values))


def test_models_are_measured_in_processes_of_their_own(model_dir):
    subjects = {
        "one": Subject(
            open=partial(TorchRunner.open, model_dir, None, "cpu"),
            file=model_dir / "model.safetensors",
        ),
        "two": Subject(open=partial(TorchRunner.open, model_dir, torch.bfloat16, "cpu"), file=None),
    }
    split = some_tokens()
    metrics = measure_speed(
        subjects, PROMPT, split, BenchmarkParams(**COUNTS), n_threads=1, progress=Silent()
    )
    exact = evaluate_stream(
        load_any_model(model_dir), split, seq_len=16, batch_tokens=64, precision="fp32"
    )
    assert metrics["one"]["val_bpb"] == pytest.approx(exact.val_bpb, rel=1e-6)
    assert metrics["two"]["val_bpb"] == pytest.approx(exact.val_bpb, rel=2e-2)
    assert metrics["two"]["val_bpb"] != metrics["one"]["val_bpb"]
    assert metrics["one"]["file_bytes"] == (model_dir / "model.safetensors").stat().st_size
    assert "file_bytes" not in metrics["two"]
    for row in metrics.values():
        assert row["decode_tokens_per_s"] > 0
        assert 50e6 < row["peak_memory_bytes"] < 2e9
        assert 0 < row["model_memory_bytes"] < row["peak_memory_bytes"] / 2


def test_a_mistake_in_a_process_is_told_here(tmp_path):
    with (
        Worker(partial(TorchRunner.open, tmp_path / "no", None, "cpu"), 1) as worker,
        pytest.raises(ArtifactError, match="not a model directory"),
    ):
        worker.opened()
    assert not worker._process.is_alive()


def test_what_does_not_fit_is_told_in_one_line():
    params = BenchmarkParams(**COUNTS)
    check_fits(params, 16)
    with pytest.raises(ParamsError, match=r"benchmark.prompt_tokens: 4 and 8 new tokens"):
        check_fits(params, 11)
    with pytest.raises(ParamsError, match=r"benchmark.eval_seq_len: 16 is longer"):
        check_fits(params, 12)
    with pytest.raises(ValueError, match=r"rounds: must be at least 1, got 0"):
        BenchmarkParams(**{**COUNTS, "rounds": 0})


def test_the_fingerprint_is_plain_and_stable():
    assert fingerprint() == fingerprint()
    assert fingerprint()["threads"] == torch.get_num_threads()
    assert fingerprint()["processor"]


def test_peak_memory_counts_what_was_held():
    before = peak_memory_bytes()
    held = np.ones(100_000_000, np.uint8)
    del held
    assert peak_memory_bytes() >= before
    assert peak_memory_bytes() > 100_000_000
