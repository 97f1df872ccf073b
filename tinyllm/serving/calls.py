"""One completion call from its body to its last byte, and what happens when the client leaves."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tinyllm.errors import DataError
from tinyllm.inference.batching import Request
from tinyllm.inference.conversation import stop_ids
from tinyllm.inference.guide import Guide, Guides
from tinyllm.inference.scheduler import QueueFullError
from tinyllm.inference.session import Session
from tinyllm.serving.errors import ApiError
from tinyllm.serving.schema import Wanted
from tinyllm.serving.wire import DONE, Choice, Wire, usage_of
from tinyllm.serving.worker import Answer, Piece, Worker
from tinyllm.tokenizer.chat import Message
from tinyllm.tokenizer.special import END_OF_TEXT

T = TypeVar("T")
GONE = 499
"""The status in our own books of a call whose client left (nginx's number); nobody receives it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one call may cost."""

    max_body_bytes: int
    """Larger bodies are refused unread."""
    max_tokens: int
    """Tokens per answer; higher wishes get this many."""
    max_seconds: float
    """From the call to the end of its answer, waiting included."""


class Calls:
    """Answers calls with a session's model."""

    def __init__(
        self, session: Session, worker: Worker, limits: Limits, name: str, system: str | None
    ) -> None:
        self._session, self._worker, self._limits, self._name = session, worker, limits, name
        self._system = [Message("system", system)] if system else []
        self._guides = Guides(session.tokenizer, stop_ids(session.tokenizer))

    async def answer(self, http: HttpRequest, wanted: Wanted) -> Response:
        """Return the response to a checked call.

        Raises:
            ApiError: the model is another one, the prompt does not fit, or the queue is full.
        """
        if wanted.model != self._name:
            raise ApiError(
                404,
                f"model: there is no {wanted.model!r} here, only {self._name!r}",
                param="model",
                code="model_not_found",
            )
        requests = self._requests(wanted, http.client.host if http.client else "")
        wire = Wire(
            is_chat=bool(wanted.messages),
            model=self._name,
            tokenizer=self._session.tokenizer,
            wants_logprobs=wanted.n_top_logprobs is not None,
        )
        try:
            answers = await self._worker.submit(requests, wanted.stop, self._limits.max_seconds)
        except QueueFullError as error:
            raise ApiError(429, str(error), code="queue_full") from None
        except DataError as error:
            raise ApiError(
                400, str(error), param="messages", code="context_length_exceeded"
            ) from None
        if wanted.stream:
            return await self._stream(http, wanted, wire, answers)
        try:
            choices = await unless_gone(http, _collect(answers))
        finally:
            self._worker.cancel(answers)
        _refuse_unanswered(choices)
        return JSONResponse(wire.whole(choices, usage_of(requests[:: wanted.n], requests)))

    def _requests(self, wanted: Wanted, client: str) -> list[Request]:
        """Return a request per prompt and choice; choices have seeds that count up."""
        return [
            Request(
                prompt_ids=prompt,
                client=client,
                sampling=replace(wanted.sampling, seed=wanted.sampling.seed + i),
                n_top_logprobs=wanted.n_top_logprobs,
                guide=self._guide(wanted),
            )
            for prompt in self._prompts(wanted)
            for i in range(wanted.n)
        ]

    def _guide(self, wanted: Wanted) -> Guide | None:
        """Return a guide for one answer, if it must be JSON."""
        if wanted.json_schema is None:
            return None
        try:
            return self._guides.make(wanted.json_schema)
        except DataError as error:
            raise ApiError(400, f"response_format: {error}", param="response_format") from None

    def _prompts(self, wanted: Wanted) -> list[Sequence[int]]:
        """Return the tokens of every prompt."""
        tokenizer, template = self._session.tokenizer, self._session.template
        if wanted.messages:
            has_system = any(message.role == "system" for message in wanted.messages)
            messages = [*([] if has_system else self._system), *wanted.messages]
            try:
                return [template.encode(messages, tokenizer, add_generation_prompt=True)[0]]
            except DataError as error:
                raise ApiError(400, str(error), param="messages") from None
        prompts: list[Sequence[int]] = []
        for prompt in wanted.prompts:
            if isinstance(prompt, str):
                prompt = tuple(tokenizer.encode(prompt)) or (tokenizer.id_of(END_OF_TEXT),)
            elif not all(0 <= token < tokenizer.vocab_size for token in prompt):
                raise ApiError(
                    400,
                    f"prompt: token ids go from 0 to {tokenizer.vocab_size - 1}",
                    param="prompt",
                )
            prompts.append(prompt)
        return prompts

    async def _stream(
        self, http: HttpRequest, wanted: Wanted, wire: Wire, answers: Sequence[Answer]
    ) -> Response:
        """Return a streaming response once there is a first piece: until then a call can fail."""
        merged = _merge(answers)
        try:
            first = await unless_gone(http, anext(merged))
            _refuse_unanswered([_choice_of(first)])
        except BaseException:
            self._worker.cancel(answers)
            raise

        async def events() -> AsyncIterator[bytes]:
            """Yield the events."""
            for i in range(len(answers)):
                if event := wire.first(i):
                    yield event
            yield wire.chunk(*first)
            async for index, piece in merged:
                if event := wire.chunk(index, piece):
                    yield event
            if wanted.include_usage:
                requests = [answer.request for answer in answers]
                yield wire.usage(usage_of(requests[:: wanted.n], requests))
            yield DONE

        return _Events(events(), lambda: self._worker.cancel(answers))


class _Events(StreamingResponse):
    """Server-sent events; whatever ends them, `release` is called."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], release: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()


async def unless_gone(http: HttpRequest, work: Awaitable[T]) -> T:
    """Return what the work returns; stop it when the client leaves.

    Raises:
        ApiError: the client has left.
    """

    async def leave() -> None:
        """Return when the client leaves; its body was read before."""
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(GONE, "the client has left")
    finally:
        for future in (task, gone):
            future.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await future


async def _collect(answers: Sequence[Answer]) -> list[Choice]:
    """Return all answers when all are finished."""
    choices = [Choice(i) for i in range(len(answers))]
    async for index, piece in _merge(answers):
        choices[index].add(piece)
    return choices


async def _merge(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Piece]]:
    """Yield (index, piece) of all answers as they come, until the last one has ended."""
    waiting = {asyncio.ensure_future(answer.pieces.get()): i for i, answer in enumerate(answers)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: waiting[future]):
                index, piece = waiting.pop(future), future.result()
                if piece.reason is None:
                    waiting[asyncio.ensure_future(answers[index].pieces.get())] = index
                yield index, piece
    finally:
        for future in waiting:
            future.cancel()


def _choice_of(indexed: tuple[int, Piece]) -> Choice:
    """Return a choice with one piece."""
    choice = Choice(indexed[0])
    choice.add(indexed[1])
    return choice


def _refuse_unanswered(choices: Sequence[Choice]) -> None:
    """Refuse a call that got nothing: its time was over in the queue, or the engine failed."""
    if any(choice.reason == "failed" for choice in choices):
        raise ApiError(500, "the engine failed; the server's log says why")
    if all(choice.reason == "time" and not choice.text for choice in choices):
        raise ApiError(429, "no slot came free in time; try again later", code="queue_full")
