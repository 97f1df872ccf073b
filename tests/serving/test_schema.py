import json

import pytest

from tinyllm.serving.errors import ApiError
from tinyllm.serving.schema import parse_chat, parse_completion

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PLAIN = {"model": "m", "prompt": "hi"}


def refusal(parse, body) -> ApiError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as refused:
        parse(raw, 100)
    assert refused.value.status == 400
    return refused.value


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 10000, b'{"temperature": NaN}', b"null"]
)
def test_what_is_no_json_object_is_refused(body):
    assert "the body" in refusal(parse_chat, body).message


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        ({"messages": [7]}, "messages.0"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": "x"}, "seed"),
        ({"stream": 1}, "stream"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_a_bad_field_is_named(change, param):
    assert refusal(parse_chat, {**CHAT, **change}).param == param


@pytest.mark.parametrize("prompt", [None, [], 5, [[]], ["a", 5], [1, "a"], ["a"] * 9, [True]])
def test_a_bad_prompt_is_named(prompt):
    assert refusal(parse_completion, {**PLAIN, "prompt": prompt}).param == "prompt"


def test_what_is_wanted_is_understood():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {
        "model": "m",
        "messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}],
        "max_completion_tokens": 7,
        "temperature": 0,
        "top_k": 3,
        "stop": "x",
        "logprobs": True,
        "user": "someone",
        "presence_penalty": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    wanted = parse_chat(json.dumps(body).encode(), 100)
    assert [(m.role, m.content) for m in wanted.messages] == [("system", "s"), ("user", "ab")]
    assert (wanted.sampling.max_new_tokens, wanted.sampling.top_k) == (7, 3)
    assert (wanted.stop, wanted.n_top_logprobs, wanted.include_usage) == (("x",), 0, True)


def test_the_servers_limit_caps_the_answer_and_seeds_differ():
    first, second = (parse_completion(json.dumps(PLAIN).encode(), 100) for _ in range(2))
    assert first.sampling.max_new_tokens == 100
    capped = parse_completion(json.dumps({**PLAIN, "max_tokens": 10**6}).encode(), 100)
    assert capped.sampling.max_new_tokens == 100
    assert first.sampling.seed != second.sampling.seed
    assert first.sampling.temperature == 1.0
