"""Many at once against one by one, on a real tiny model."""

import dataclasses
import random

import pytest
import torch
from tiny_lm import VOCAB, tiny_model

from tinyllm.errors import DataError
from tinyllm.inference.batching import Engine, Request
from tinyllm.inference.generate import generate
from tinyllm.inference.prefix import compute_prefix
from tinyllm.inference.sampling import SamplingParams
from tinyllm.inference.scheduler import QueueFullError
from tinyllm.model.sizes import MlaSizes
from tinyllm.quantization.int8 import quantize_model

GREEDY = SamplingParams(max_new_tokens=12)


def engine(model, **changes) -> Engine:
    settings = {"n_slots": 3, "chunk_tokens": 5, "max_waiting": 50, "prefixes": ()}
    return Engine(model, {0}, **{**settings, **changes})


def prompts(n: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    start = [rng.randrange(1, VOCAB) for _ in range(shared)]
    return [
        start + [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 30 - shared))]
        for _ in range(n)
    ]


def run(e: Engine, requests: list[Request], arrivals: random.Random | None = None) -> None:
    """Submit in turn, some while others run already, and step until all are done."""
    todo = list(requests)
    while todo or not e.is_idle:
        while todo and (arrivals is None or arrivals.random() < 0.5):
            e.submit(todo.pop(0))
        e.step()


def answer(request: Request) -> list[int]:
    return request.ids[len(request.prompt_ids) :]


@pytest.mark.parametrize("weight_bits", [32, 8, 4])
@pytest.mark.parametrize("cache", [None, torch.int8])
@pytest.mark.parametrize("shared", [0, 12])
def test_together_equals_one_by_one(weight_bits, cache, shared):
    model = tiny_model(d=64, n_heads=2, n_kv_heads=1, d_head=32)
    model = model if weight_bits == 32 else quantize_model(model, weight_bits=weight_bits)
    model.cache_dtype = cache
    asked = prompts(14, shared=shared)
    requests = [Request(prompt_ids=ids, sampling=GREEDY) for ids in asked]
    run(engine(model), requests, random.Random(1))
    for request in requests:
        alone = generate(model, request.prompt_ids, GREEDY, {0})
        assert answer(request) == list(alone)
        assert request.reason == alone.reason
    assert sum(request.n_shared for request in requests) >= shared * 5  # slots were taken over


@pytest.mark.parametrize(
    "kind",
    [
        {
            "mla": MlaSizes(q_rank=None, kv_rank=24, d_nope=8, d_rope=4, d_v=12),
            **{"d_head": 12, "qk_norm": False, "n_kv_heads": 4},
        },
        {"window": 5, "window_layers": (0,)},
        {"positions": "learned", "norm": "layernorm", "ffn": "gelu", "bias": True},
    ],
    ids=["latent", "window", "gpt-2"],
)
def test_every_kind_of_model_is_served(kind):
    model = tiny_model(**kind)
    requests = [Request(prompt_ids=ids, sampling=GREEDY) for ids in prompts(6, shared=12)]
    prefix = compute_prefix(model, requests[0].prompt_ids[:12])
    run(engine(model, prefixes=[prefix]), requests, random.Random(1))
    for request in requests:
        assert answer(request) == list(generate(model, request.prompt_ids, GREEDY, {0}))


def test_a_seed_gives_the_same_text_alone_and_in_company():
    model = tiny_model()
    hot = SamplingParams(
        temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=7, max_new_tokens=12
    )
    asked = prompts(8)
    mixed = [hot, GREEDY, dataclasses.replace(hot, seed=8), dataclasses.replace(hot, top_k=0)]
    requests = [Request(prompt_ids=ids, sampling=mixed[i % 4]) for i, ids in enumerate(asked)]
    run(engine(model), requests)
    for request in requests:
        assert answer(request) == list(generate(model, request.prompt_ids, request.sampling, {0}))


@pytest.mark.parametrize("cache", [None, torch.int8])
def test_a_prefix_changes_no_token_and_is_not_read_again(monkeypatch, cache):
    model = tiny_model()
    model.cache_dtype = cache
    asked = prompts(5, shared=20)
    prefix = compute_prefix(model, asked[0][:20])
    e = engine(model, prefixes=[prefix])
    read = []
    forward = model.embed_tokens.forward
    monkeypatch.setattr(
        model.embed_tokens, "forward", lambda ids: read.append(ids.shape) or forward(ids)
    )
    requests = [Request(prompt_ids=ids, sampling=GREEDY) for ids in asked]
    run(e, requests)
    assert sum(shape[1] for shape in read if shape[0] == 1) < 5 * 30
    assert all(request.n_shared == 20 for request in requests)
    for request in requests:
        assert answer(request) == list(generate(model, request.prompt_ids, GREEDY, {0}))


def test_cancelling_frees_the_slot_and_disturbs_nobody():
    model = tiny_model()
    e = engine(model, n_slots=2)
    requests = [Request(prompt_ids=ids, sampling=GREEDY) for ids in prompts(4)]
    for request in requests:
        e.submit(request)
    for _ in range(8):
        e.step()
    assert requests[1].slot is not None
    e.cancel(requests[1])
    e.cancel(requests[3])  # still in the queue
    while not e.is_idle:
        e.step()
    assert requests[1].reason is requests[3].reason is None
    for request in (requests[0], requests[2]):
        assert answer(request) == list(generate(model, request.prompt_ids, GREEDY, {0}))


def test_limits_are_those_of_one_by_one():
    model = tiny_model()
    endless = SamplingParams(max_new_tokens=1000)
    request = Request(prompt_ids=[5, 17, 42], sampling=endless)
    run(engine(model), [request])
    assert (len(request.ids), request.reason) == (model.config.max_seq_len, "context")
    one = Request(prompt_ids=[5, 17, 42], sampling=SamplingParams(max_new_tokens=1))
    run(engine(model), [one])
    assert (len(answer(one)), one.reason) == (1, "length")


def test_logprobs_are_those_of_a_full_pass():
    model = tiny_model()
    e = engine(model)
    request = Request(prompt_ids=[5, 17, 42], sampling=GREEDY, n_top_logprobs=2)
    e.submit(request)
    told = []
    while not e.is_idle:
        told += [made.logprob for made in e.step() if made.token is not None]
    with torch.inference_mode():
        exact = model(torch.tensor([request.ids]))[0].double().log_softmax(-1)
    for i, (token, logprob) in enumerate(zip(answer(request), told, strict=True)):
        assert logprob.logprob == pytest.approx(float(exact[2 + i, token]), abs=1e-4)
        assert logprob.top[0][0] == token
        assert len(logprob.top) == 2


def test_what_does_not_fit_is_refused_at_once():
    e = engine(tiny_model(), n_slots=1, max_waiting=1)
    with pytest.raises(DataError, match="prompt: has 60 tokens, this model takes 1 to 47"):
        e.submit(Request(prompt_ids=[1] * 60, sampling=GREEDY))
    for _ in range(2):
        e.submit(Request(prompt_ids=[1], sampling=GREEDY))
    with pytest.raises(QueueFullError):
        e.submit(Request(prompt_ids=[1], sampling=GREEDY))
