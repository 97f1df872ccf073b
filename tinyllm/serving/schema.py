"""What a client may ask for: bodies of OpenAI's completion calls, checked field by field.

What would change the answer and is not served is refused, never dropped in silence. Fields beyond
OpenAI's: `top_k`, `min_p`, `repetition_penalty`.
"""

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinyllm.inference.sampling import SamplingParams
from tinyllm.serving.errors import ApiError
from tinyllm.tokenizer.chat import Message

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
LABELS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier"})
"""Fields that change nothing in an answer."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": ({}, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "modalities": (["text"], None),
    "best_of": (1, None),
    "suffix": ("", None),
    "echo": (False, None),
}
"""Fields that are not served, with the values that mean nothing."""
MAX_STOPS, MAX_CHOICES, MAX_TOP_LOGPROBS = 4, 8, 20
MAX_STOP_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One call, checked."""

    model: str
    messages: tuple[Message, ...]
    """Of a chat; empty for a plain completion."""
    prompts: tuple[str | tuple[int, ...], ...]
    """Of a plain completion; empty for a chat."""
    sampling: SamplingParams
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    n_top_logprobs: int | None
    """None: no logprobs."""
    json_schema: Mapping[str, Any] | None
    """What the answer must be; None: any text."""


class _Fields:
    """A body's fields, each taken once; what is left over at the end is unknown."""

    def __init__(self, body: bytes) -> None:
        try:
            document = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            raise ApiError(400, "the body is not JSON") from None
        if not isinstance(document, dict):
            raise ApiError(400, "the body must be a JSON object")
        self._left: dict[str, Any] = document

    def take(self, name: str, kind: type, default: Any, least: float, most: float) -> Any:
        """Return a number, or the default where it is absent or null."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        kinds = (int, float) if kind is float else (kind,)
        if type(value) not in kinds or not least <= value <= most:
            what = "an integer" if kind is int else "a number"
            limits = f"between {least:g} and {most:g}" if most < math.inf else f"from {least:g}"
            raise ApiError(400, f"{name}: must be {what} {limits}", param=name)
        return kind(value)

    def flag(self, name: str) -> bool:
        """Return a boolean, false where it is absent or null."""
        value = self._left.pop(name, None)
        if value not in (None, True, False) or type(value) is int:
            raise ApiError(400, f"{name}: must be true or false", param=name)
        return bool(value)

    def raw(self, name: str) -> Any:
        """Return whatever is there, None where it is absent."""
        return self._left.pop(name, None)

    def finish(self) -> None:
        """Refuse what is not served and what is not known."""
        for name, value in self._left.items():
            if name in LABELS:
                continue
            if name not in NEUTRAL:
                raise ApiError(400, f"{name}: no such field", param=name)
            if value not in NEUTRAL[name]:
                raise ApiError(400, f"{name}: not served here; leave it out", param=name)


def parse_chat(body: bytes, max_tokens: int) -> Wanted:
    """Return a call of /v1/chat/completions.

    Args:
        body: as it came.
        max_tokens: the server's limit per answer; higher wishes get this.

    Raises:
        ApiError: 400 with the field's name.
    """
    fields = _Fields(body)
    messages = _messages(fields.raw("messages"))
    newer = fields.take("max_completion_tokens", int, None, 1, 1 << 30)
    wants_logprobs = fields.flag("logprobs")
    n_top = fields.take("top_logprobs", int, 0, 0, MAX_TOP_LOGPROBS)
    if n_top and not wants_logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
    return _parse(
        fields,
        max_tokens,
        newer,
        messages=messages,
        prompts=(),
        n_top_logprobs=n_top if wants_logprobs else None,
    )


def parse_completion(body: bytes, max_tokens: int) -> Wanted:
    """Return a call of /v1/completions; arguments and errors as in `parse_chat`."""
    fields = _Fields(body)
    prompts = _prompts(fields.raw("prompt"))
    n_top = fields.take("logprobs", int, None, 0, MAX_TOP_LOGPROBS)
    return _parse(fields, max_tokens, None, messages=(), prompts=prompts, n_top_logprobs=n_top)


def _parse(
    fields: _Fields,
    limit: int,
    newer_max_tokens: int | None,
    *,
    messages: tuple[Message, ...],
    prompts: tuple[str | tuple[int, ...], ...],
    n_top_logprobs: int | None,
) -> Wanted:
    """Return what both calls have in common."""
    older = fields.take("max_tokens", int, limit, 1, 1 << 30)
    model = fields.raw("model")
    if not isinstance(model, str):
        raise ApiError(400, "model: must be a name, see /v1/models", param="model")
    sampling = SamplingParams(
        temperature=fields.take("temperature", float, 1.0, 0, 100),
        top_k=fields.take("top_k", int, 0, 0, 1 << 30),
        top_p=fields.take("top_p", float, 1.0, 1e-6, 1),
        min_p=fields.take("min_p", float, 0.0, 0, 1),
        repetition_penalty=fields.take("repetition_penalty", float, 1.0, 0.01, 100),
        seed=fields.take("seed", int, secrets.randbits(31), -(1 << 62), 1 << 62),
        max_new_tokens=min(limit, newer_max_tokens or older),
    )
    stream, options = fields.flag("stream"), fields.raw("stream_options")
    if options is not None and not (stream and isinstance(options, dict)):
        raise ApiError(400, "stream_options: an object, only with stream", param="stream_options")
    wanted = Wanted(
        model=model,
        messages=messages,
        prompts=prompts,
        sampling=sampling,
        n=fields.take("n", int, 1, 1, MAX_CHOICES),
        stop=_stops(fields.raw("stop")),
        stream=stream,
        include_usage=bool((options or {}).get("include_usage")),
        n_top_logprobs=n_top_logprobs,
        json_schema=_json_schema(fields.raw("response_format")),
    )
    fields.finish()
    return wanted


def _messages(value: Any) -> tuple[Message, ...]:
    """Return the turns of a chat; content is text, or parts that are all text."""
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages: must be a list of at least one message", param="messages")
    messages = []
    for i, message in enumerate(value):
        where = f"messages.{i}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ApiError(400, f"{where}: must be an object with a role", param=where)
        if message["role"] not in ROLES:
            raise ApiError(
                400, f"{where}.role: must be one of {', '.join(ROLES)}", param=f"{where}.role"
            )
        content = message.get("content")
        if isinstance(content, list) and all(_is_text(part) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ApiError(400, f"{where}.content: must be text", param=f"{where}.content")
        messages.append(Message(ROLES[message["role"]], content))  # type: ignore[arg-type]
    return tuple(messages)


def _is_text(part: Any) -> bool:
    """Whether a content part is text."""
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Return one prompt or several, each a text or token ids."""
    several = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not several or len(several) > MAX_CHOICES:
        raise ApiError(400, f"prompt: 1 to {MAX_CHOICES} prompts are taken", param="prompt")
    if not all(isinstance(prompt, str) or _is_ids(prompt) for prompt in several):
        raise ApiError(400, "prompt: must be text, token ids, or a list of these", param="prompt")
    return tuple(p if isinstance(p, str) else tuple(p) for p in several)


def _is_ids(value: Any) -> bool:
    """Whether a value is a list of token ids."""
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _stops(value: Any) -> tuple[str, ...]:
    """Return the stop strings."""
    stops = [value] if isinstance(value, str) else value if value is not None else []
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in stops)
    ):
        raise ApiError(
            400,
            f"stop: must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters",
            param="stop",
        )
    return tuple(stops)


def _json_schema(value: Any) -> Mapping[str, Any] | None:
    """Return the schema of a response format, None for plain text."""
    match value:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return schema
    raise ApiError(
        400,
        "response_format: its type must be text, json_object, or json_schema with a schema",
        param="response_format",
    )


def _refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which are no JSON."""
    raise ValueError(name)
