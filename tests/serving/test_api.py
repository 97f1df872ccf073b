"""OpenAI's own client, curl and bare sockets against running servers."""

import http.client
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request

import openai
import pytest
import torch
from conftest import PATIENCE_S, open_stream

from tinyllm.inference.conversation import stop_ids
from tinyllm.inference.generate import generate
from tinyllm.inference.prefix import system_prefix
from tinyllm.inference.sampling import SamplingParams
from tinyllm.inference.session import open_session
from tinyllm.quantization.load import load_any_model
from tinyllm.serving.server import ServeError, listen
from tinyllm.tokenizer.chat import Message

MESSAGES = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def session(model_dir):
    return open_session(model_dir, load_any_model, torch.device("cpu"))


def alone(session, ids, **sampling) -> str:
    sampling = SamplingParams(**{"max_new_tokens": 16, **sampling})
    tokens = list(generate(session.model, ids, sampling, stop_ids(session.tokenizer)))
    return session.tokenizer.decode(tokens)


def metric(server, name: str) -> float:
    request = urllib.request.Request(
        f"{server.address}/metrics", headers={"Authorization": "Bearer sesame"}
    )
    with urllib.request.urlopen(request) as response:
        text = response.read().decode()
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_chat_equals_generation_alone_whole_and_streamed(client, session):
    messages = [Message("system", "Be brief."), Message("user", "Hello there")]
    ids, _ = session.template.encode(messages, session.tokenizer, add_generation_prompt=True)
    expected = alone(session, ids)
    settings = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**settings)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 16)
    shared = system_prefix("Be brief.", session.template, session.tokenizer)
    assert whole.usage.prompt_tokens_details.cached_tokens >= len(shared) > 8
    chunks = list(
        client.chat.completions.create(
            **settings, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == expected
    assert sum(map(bool, texts)) > 5
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_seeds_choices_and_samplers(client, session):
    settings = {"model": "tiny", "prompt": "hello", "max_tokens": 16, "temperature": 1.5}
    two = client.completions.create(**settings, n=2, seed=5, top_p=0.95, extra_body={"top_k": 50})
    ids = session.tokenizer.encode("hello")
    for choice, seed in zip(two.choices, (5, 6), strict=True):
        assert choice.text == alone(session, ids, temperature=1.5, top_p=0.95, top_k=50, seed=seed)
    free = {client.completions.create(**settings).choices[0].text for _ in range(3)}
    assert len(free) == 3


def test_several_prompts_as_text_and_tokens(client, session):
    ids = session.tokenizer.encode("hello")
    settings = {"model": "tiny", "max_tokens": 16, "temperature": 0}
    both = client.completions.create(**settings, prompt=["hello", "bye"])
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == alone(session, ids)
    assert both.choices[1].text == alone(session, session.tokenizer.encode("bye"))
    tokens = client.completions.create(**settings, prompt=ids)
    assert tokens.choices[0].text == both.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_never_reach_the_client(client, session, stream):
    text = alone(session, session.tokenizer.encode("hello"), max_new_tokens=40)
    stop = text[11:15]
    made = client.completions.create(
        model="tiny", prompt="hello", max_tokens=40, temperature=0, stop=[stop], stream=stream
    )
    chunks = list(made) if stream else [made]
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs_of_chats_and_plain_completions(client):
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    tokens = chat.choices[0].logprobs.content
    raw = bytes(byte for token in tokens for byte in token.bytes)
    assert raw.decode(errors="replace") == chat.choices[0].message.content
    for token in tokens:
        assert token.top_logprobs[0].token == token.token  # greedy
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
        assert token.logprob >= token.top_logprobs[1].logprob >= token.top_logprobs[2].logprob
    plain = client.completions.create(
        model="tiny", prompt="hello", temperature=0, max_tokens=5, logprobs=2, stream=True
    )
    told = [chunk.choices[0].logprobs for chunk in plain]
    assert sum(len(one.tokens) for one in told if one) == 5


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    with urllib.request.urlopen(f"{server.address}/health") as response:
        assert json.load(response) == {"status": "ok"}


def test_mistakes_come_back_in_openais_form(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="tools: not served here") as refused:
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert refused.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="tiny", prompt="hello " * 3000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="0 to 399"):
        client.completions.create(model="tiny", prompt=[5, 400])


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_streams_and_is_refused(server):
    def curl(*arguments: str) -> str:
        command = ["curl", "-sN", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S).stdout

    url, declared = f"{server.address}/v1/chat/completions", "Content-Type: application/json"
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "stream": True, "max_tokens": 3})
    events = curl(url, "-H", declared, "-d", body).split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1])
    assert events[-2] == "data: [DONE]"
    assert json.loads(events[0][6:])["object"] == "chat.completion.chunk"
    assert json.loads(curl(url, "-H", declared, "-d", "{"))["error"]["message"].startswith(
        "the body"
    )
    assert "Content-Type" in json.loads(curl(url, "-d", body))["error"]["message"]
    assert "Invalid host" in curl(url, "-H", "Host: evil.example", "-H", declared, "-d", body)
    head = curl("-i", f"{server.address}/").lower()
    assert "content-security-policy: default-src 'none'" in head
    assert "http://" not in head.split("\n\n", 1)[1]


def test_a_client_that_leaves_frees_its_slot(server):
    before = metric(server, "tinyllm_cancelled_total")
    connections = [open_stream(server) for _ in range(3)]
    assert metric(server, "tinyllm_running") == 3
    for connection in connections:
        connection.close()
    wait_until(lambda: metric(server, "tinyllm_running") == 0)
    assert metric(server, "tinyllm_cancelled_total") == before + 3


def test_a_client_that_leaves_before_a_whole_answer_frees_its_slot(server):
    before = metric(server, "tinyllm_cancelled_total")
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "max_tokens": 2000})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    wait_until(lambda: metric(server, "tinyllm_running") == 1)
    connection.close()
    wait_until(lambda: metric(server, "tinyllm_running") == 0)
    assert metric(server, "tinyllm_cancelled_total") == before + 1


def test_a_full_queue_a_missing_key_and_too_large_a_body(strict):
    url = f"{strict.address}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="sesame", max_retries=0) as client,
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger,
    ):
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        busy = open_stream(strict)
        waiting = threading.Thread(
            target=lambda: client.completions.create(model="tiny", prompt="a", max_tokens=1)
        )
        waiting.start()
        wait_until(lambda: metric(strict, "tinyllm_waiting") == 1)
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="tiny", prompt="b")
        assert full.value.response.headers["retry-after"] == "1"
        assert full.value.code == "queue_full"
        busy.close()
        waiting.join(PATIENCE_S)
        with pytest.raises(openai.APIStatusError, match="larger than 5000 bytes") as large:
            client.completions.create(model="tiny", prompt="x" * 6000)
        assert large.value.status_code == 413


def test_a_taken_port_is_told_in_one_line(server):
    with pytest.raises(ServeError, match=r"127.0.0.1:\d+: Address already in use; choose another"):
        listen("127.0.0.1", server.port)


def test_an_answer_is_json_of_the_asked_schema(client):
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["merry", "grim"]}, "age": {"enum": [7, 70]}},
        "required": ["mood", "age"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=400, seed=1, n=2, response_format=wanted
    )
    for choice in answer.choices:
        person = json.loads(choice.message.content)
        assert choice.finish_reason == "stop"
        assert person["mood"] in ("merry", "grim")
        assert person["age"] in (7, 70)


def test_a_schema_that_cannot_be_enforced_is_refused(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}
    with pytest.raises(openai.BadRequestError, match="the schema cannot be used"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=wanted)
