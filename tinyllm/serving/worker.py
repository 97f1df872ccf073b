"""The thread that owns the engine, and the answers that the event loop reads from it.

All calls to the engine happen in that thread; others hand it functions to run between two steps.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from tinyllm.inference.batching import Engine, Made, Request
from tinyllm.inference.sampling import TokenLogprob
from tinyllm.inference.stopping import StopStrings
from tinyllm.serving.metrics import Metrics
from tinyllm.tokenizer.tokenizer import TextStream, Tokenizer

EndReason = Literal["stop", "length", "context", "time", "failed"]
"""As `StopReason`; `time`: it took too long, `failed`: a bug of ours, told in the log."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one token adds to an answer."""

    text: str
    """Sure to belong to it; may be empty, and may hold text of tokens before."""
    token: int | None
    """None at an end without a token."""
    logprob: TokenLogprob | None
    reason: EndReason | None
    """None while more may come."""


@dataclass(kw_only=True, slots=True, eq=False)
class Answer:
    """One answer on its way from the engine to a client."""

    request: Request
    text: TextStream
    stops: StopStrings
    deadline_s: float
    """When it ends at the latest, by `time.monotonic`."""
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    """Read by the event loop; the last one has a reason."""
    submitted_s: float = field(default_factory=time.monotonic)
    told_s: float | None = None
    """When its latest token was made."""

    def tell(self, piece: Piece) -> None:
        """Hand a piece to the event loop, from any thread."""
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed: nobody reads any more
            log.debug("an answer came after the server had closed")


class Worker:
    """Steps the engine while there is something to do, and sleeps else."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, metrics: Metrics) -> None:
        self._engine, self._tokenizer, self._metrics = engine, tokenizer, metrics
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._answers: dict[Request, Answer] = {}
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="tinyllm-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step at hand; what still runs is cancelled."""
        self._inbox.put(self._quit)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether requests will be answered."""
        return self._thread.is_alive()

    async def submit(
        self, requests: Sequence[Request], stop: Sequence[str], limit_s: float
    ) -> list[Answer]:
        """Let the engine answer some requests, all or none of them.

        Args:
            requests: the choices of one call.
            stop: strings that end an answer.
            limit_s: seconds from now that an answer may take.

        Raises:
            DataError: a prompt does not fit.
            QueueFullError: too many requests wait.
        """
        loop, deadline_s = asyncio.get_running_loop(), time.monotonic() + limit_s
        answers = [
            Answer(
                request=request,
                text=TextStream(self._tokenizer),
                stops=StopStrings(stop),
                deadline_s=deadline_s,
                loop=loop,
            )
            for request in requests
        ]
        done: Future[None] = Future()

        def submit_all() -> None:
            """Run in the engine's thread."""
            try:
                for answer in answers:
                    self._engine.submit(answer.request)
                    self._answers[answer.request] = answer
            except Exception as error:
                self._drop(answers)
                done.set_exception(error)
            else:
                done.set_result(None)

        self._inbox.put(submit_all)
        try:
            await asyncio.shield(asyncio.wrap_future(done))
        except asyncio.CancelledError:
            self.cancel(answers)
            raise
        return answers

    def cancel(self, answers: Sequence[Answer]) -> None:
        """End answers that nobody reads any more, before the next step; done ones stay done."""
        self._inbox.put(lambda: self._metrics.count("cancelled", self._drop(answers)))

    def cut_off(self) -> None:
        """End all answers as if their time were over."""
        self._inbox.put(lambda: self._end_all("time"))

    def _run(self) -> None:
        """Be the thread."""
        while not self._is_stopping:
            try:
                self._do_inbox()
                if self._is_stopping or self._engine.is_idle:
                    continue
                for made in self._engine.step():
                    self._tell(made)
                self._end_late()
            except Exception:
                log.exception("the engine failed; the running requests are ended")
                self._end_all("failed")

    def _do_inbox(self) -> None:
        """Run what others asked for; wait for it if there is nothing else to do."""
        try:
            while True:
                self._inbox.get(block=self._engine.is_idle and not self._is_stopping)()
        except queue.Empty:
            return

    def _quit(self) -> None:
        """Cancel everything and let the thread end."""
        self._end_all("time")
        self._is_stopping = True

    def _drop(self, answers: Sequence[Answer]) -> int:
        """Take answers out of the engine; return how many were still there."""
        n = 0
        for answer in answers:
            if self._answers.pop(answer.request, None) is not None:
                self._engine.cancel(answer.request)
                n += 1
        return n

    def _tell(self, made: Made) -> None:
        """Turn a token into text for its reader; end the answer at a stop string."""
        answer = self._answers[made.request]
        text, reason = "", made.request.reason
        if made.token is not None:
            self._time(answer)
            text = answer.stops.feed(answer.text.feed(made.token))
        if reason is not None:
            text += answer.stops.feed(answer.text.finish()) + answer.stops.finish()
        if answer.stops.hit:
            reason = "stop"
        if reason is not None:
            self._drop([answer])
        answer.tell(Piece(text=text, token=made.token, logprob=made.logprob, reason=reason))

    def _time(self, answer: Answer) -> None:
        """Count a token and the time it took."""
        now_s, is_first = time.monotonic(), answer.told_s is None
        since_s = answer.submitted_s if answer.told_s is None else answer.told_s
        self._metrics.time_token(now_s - since_s, is_first=is_first)
        self._metrics.count("answer_tokens")
        if is_first:
            self._metrics.count("prompt_tokens", len(answer.request.prompt_ids))
            self._metrics.count("shared_tokens", answer.request.n_shared)
        answer.told_s = now_s

    def _end_late(self) -> None:
        """End answers whose time is over."""
        now_s = time.monotonic()
        for answer in [late for late in self._answers.values() if now_s > late.deadline_s]:
            self._end(answer, "time")

    def _end_all(self, reason: EndReason) -> None:
        """End every answer."""
        for answer in list(self._answers.values()):
            self._end(answer, reason)

    def _end(self, answer: Answer, reason: EndReason) -> None:
        """End an answer that is not finished, with what was held back."""
        self._drop([answer])
        text = answer.stops.feed(answer.text.finish()) + answer.stops.finish()
        answer.tell(Piece(text=text, token=None, logprob=None, reason=reason))
