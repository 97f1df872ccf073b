"""The engine's thread without HTTP."""

import asyncio
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import PATIENCE_S
from starlette.testclient import TestClient
from tiny_dirs import write_model_dir

from tinyllm.inference.batching import Engine, Request
from tinyllm.inference.sampling import SamplingParams
from tinyllm.inference.session import open_session
from tinyllm.quantization.load import load_any_model
from tinyllm.serving import worker as worker_module
from tinyllm.serving.app import build_app
from tinyllm.serving.calls import Limits
from tinyllm.serving.metrics import Metrics
from tinyllm.serving.worker import Worker


@pytest.fixture
def engine_and_worker(tmp_path):
    session = open_session(write_model_dir(tmp_path / "m"), load_any_model, torch.device("cpu"))
    engine = Engine(session.model, (), n_slots=1, chunk_tokens=8, max_waiting=4)
    worker = Worker(engine, session.tokenizer, Metrics({}))
    worker.start()
    yield engine, worker
    worker.stop()
    assert not worker.is_alive


def wanted(n: int) -> list[Request]:
    sampling = SamplingParams(max_new_tokens=3)
    return [Request(prompt_ids=[5, 17, 42], sampling=sampling) for _ in range(n)]


async def last_reason(answer) -> str:
    while True:
        piece = await asyncio.wait_for(answer.pieces.get(), PATIENCE_S)
        if piece.reason is not None:
            return piece.reason


def test_a_bug_ends_what_runs_and_not_the_server(engine_and_worker, monkeypatch, caplog):
    engine, worker = engine_and_worker

    async def scenario() -> None:
        def broken() -> None:
            monkeypatch.undo()
            raise RuntimeError("a bug")

        monkeypatch.setattr(engine, "step", broken)
        answers = await worker.submit(wanted(3), (), 60)
        assert [await last_reason(answer) for answer in answers] == ["failed"] * 3
        (again,) = await worker.submit(wanted(1), (), 60)
        assert await last_reason(again) == "length"

    asyncio.run(scenario())
    assert "a bug" in caplog.text
    assert engine.is_idle


def test_an_answer_ends_when_its_time_is_over_also_in_the_queue(engine_and_worker):
    engine, worker = engine_and_worker

    async def scenario() -> None:
        answers = await worker.submit(wanted(3), (), 0.0)
        assert [await last_reason(answer) for answer in answers] == ["time"] * 3

    asyncio.run(scenario())
    assert engine.is_idle


def test_a_call_whose_time_is_over_gets_what_there_is(tmp_path, monkeypatch):
    session = open_session(write_model_dir(tmp_path / "m"), load_any_model, torch.device("cpu"))
    engine = Engine(session.model, (), n_slots=1, chunk_tokens=8, max_waiting=4)
    limits = Limits(max_body_bytes=5000, max_tokens=40, max_seconds=20)
    app = build_app(
        *(session, engine, limits),
        name="tiny",
        system=None,
        api_key=None,
        is_local=False,
        on_ready=lambda: None,
    )
    clock = SimpleNamespace(monotonic=itertools.count().__next__)  # a second per look
    monkeypatch.setattr(worker_module, "time", clock)
    with TestClient(app) as client:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 40, "temperature": 0}
        done = client.post("/v1/completions", json=body).json()
    assert done["choices"][0]["finish_reason"] == "length"
    assert 0 < done["usage"]["completion_tokens"] < 20


def test_choices_are_taken_all_or_none(engine_and_worker):
    engine, worker = engine_and_worker

    async def scenario() -> None:
        with pytest.raises(Exception, match="4 requests wait"):
            await worker.submit(wanted(6), (), 60)
        answers = await worker.submit(wanted(2), (), 60)
        assert [await last_reason(answer) for answer in answers] == ["length"] * 2

    asyncio.run(scenario())
    assert engine.is_idle
