"""Answers in OpenAI's JSON, whole or chunk by chunk. No logic: only the shapes."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyllm.inference.batching import Request
from tinyllm.inference.sampling import TokenLogprob
from tinyllm.serving.worker import EndReason, Piece
from tinyllm.tokenizer.tokenizer import Tokenizer

FINISH: dict[EndReason, str] = {
    "stop": "stop",
    "length": "length",
    "context": "length",
    "time": "length",
}
"""OpenAI's names; what was cut short for any cause is `length`."""
DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    index: int
    text: str = ""
    reason: EndReason | None = None
    logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Add what a token brought."""
        self.text += piece.text
        self.reason = piece.reason
        if piece.token is not None and piece.logprob is not None:
            self.logprobs.append((piece.token, piece.logprob))


class Wire:
    """The JSON of one call."""

    def __init__(
        self, *, is_chat: bool, model: str, tokenizer: Tokenizer, wants_logprobs: bool
    ) -> None:
        self._is_chat, self._model, self._tokenizer = is_chat, model, tokenizer
        self._wants_logprobs = wants_logprobs
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a call that does not stream."""
        return {
            **self._head("chat.completion" if self._is_chat else "text_completion"),
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage,
        }

    def first(self, index: int) -> bytes:
        """Return the event with which an answer begins; plain completions have none."""
        return self._event(index, {"role": "assistant", "content": ""}) if self._is_chat else b""

    def chunk(self, index: int, piece: Piece) -> bytes:
        """Return the event of a piece; nothing where it adds nothing."""
        has_logprob = self._wants_logprobs and piece.logprob is not None
        if not piece.text and not has_logprob and piece.reason is None:
            return b""
        one = Choice(index)
        one.add(piece)
        return self._event(
            index,
            {"content": piece.text} if piece.text else {},
            text=piece.text,
            logprobs=self._logprobs(one.logprobs) if has_logprob else None,
            reason=piece.reason,
        )

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the event that tells the usage, without choices."""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return _sse({**self._head(kind), "choices": [], "usage": usage})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _event(
        self,
        index: int,
        delta: dict[str, str],
        *,
        text: str = "",
        logprobs: dict[str, Any] | None = None,
        reason: EndReason | None = None,
    ) -> bytes:
        """Return one server-sent event."""
        choice = {
            "index": index,
            "logprobs": logprobs,
            "finish_reason": None if reason is None else FINISH.get(reason, "length"),
        }
        content = {"delta": delta} if self._is_chat else {"text": text}
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return _sse({**self._head(kind), "choices": [{**choice, **content}]})

    def _choice(self, choice: Choice) -> dict[str, Any]:
        """Return one finished answer."""
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            if self._is_chat
            else {"text": choice.text}
        )
        return {
            "index": choice.index,
            **content,
            "logprobs": self._logprobs(choice.logprobs) if self._wants_logprobs else None,
            "finish_reason": FINISH.get(choice.reason or "length", "length"),
        }

    def _logprobs(self, tokens: Sequence[tuple[int, TokenLogprob]]) -> dict[str, Any]:
        """Return the logprobs of some tokens in the form of the call."""
        if self._is_chat:
            return {
                "content": [
                    {
                        **self._token(token, told.logprob),
                        "top_logprobs": [self._token(*other) for other in told.top],
                    }
                    for token, told in tokens
                ],
                "refusal": None,
            }
        texts = [self._text(token) for token, _ in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [told.logprob for _, told in tokens],
            "top_logprobs": [
                {self._text(other): logprob for other, logprob in told.top} for _, told in tokens
            ],
            "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        """Return a token of a chat's logprobs."""
        raw = self._tokenizer.token_bytes(token, skip_special=False)
        return {"token": self._text(token), "logprob": logprob, "bytes": list(raw)}

    def _text(self, token: int) -> str:
        """Return a token as text; U+FFFD stands for bytes that are only part of a character."""
        return self._tokenizer.decode([token], skip_special=False)


def usage_of(prompts: Sequence[Request], answers: Sequence[Request]) -> dict[str, Any]:
    """Return the tokens of a call: each prompt counts once, whatever the number of choices."""
    n_prompt = sum(len(request.prompt_ids) for request in prompts)
    n_answer = sum(len(request.ids) - len(request.prompt_ids) for request in answers)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "total_tokens": n_prompt + n_answer,
        "prompt_tokens_details": {"cached_tokens": sum(r.n_shared for r in prompts)},
    }


def _sse(document: dict[str, Any]) -> bytes:
    """Return a server-sent event with a JSON document."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"
