"""Many requests at once: the scheduler's plan carried out on a model, one step at a time.

Continuous batching (Yu et al. 2022, Orca, OSDI): requests come and go between any two tokens. Not
thread-safe: one thread submits, cancels and steps. Dimensions: B slots of a pass, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tinyllm.inference.generate import StopReason, cache_dtype, check_prompt
from tinyllm.inference.guide import Guide
from tinyllm.inference.prefix import Prefix
from tinyllm.inference.sampling import (
    SamplingParams,
    TokenLogprob,
    draw,
    likeliest,
    next_logits,
    token_logprob,
)
from tinyllm.inference.scheduler import Job, Scheduler
from tinyllm.inference.slots import SlotCache
from tinyllm.model.transformer import Transformer


@dataclass(kw_only=True, slots=True, eq=False)
class Request(Job):
    """One answer that is wanted."""

    sampling: SamplingParams
    """How tokens are chosen, and how many at most."""
    n_top_logprobs: int | None = None
    """How many alternatives are told per token; None: no logprobs at all."""
    guide: Guide | None = None
    """Which tokens its answer may have; None: all."""
    filters: SamplingParams = field(init=False)
    """`sampling` without what is the request's alone: those who share it are sampled together."""
    reason: StopReason | None = field(default=None, init=False)
    """Why it ended; None before that and when it was cancelled."""
    generator: torch.Generator | None = field(default=None, init=False)
    """Its own source of draws, made when it gets a slot; greedy requests need none."""
    seen: Tensor | None = field(default=None, init=False)
    """Tokens that occurred, kept only for the repetition penalty."""

    def __post_init__(self) -> None:
        """Begin as every job does."""
        Job.__post_init__(self)  # `super()` would be the class before it got slots
        self.filters = replace(self.sampling, seed=0, max_new_tokens=1)


@dataclass(frozen=True, slots=True)
class Made:
    """What a step made of one request."""

    request: Request
    token: int | None
    """None: a stop token came, which is not part of the answer."""
    logprob: TokenLogprob | None
    """If it was asked for."""


class Engine:
    """A model that serves a queue of requests."""

    def __init__(
        self,
        model: Transformer,
        stop_ids: Collection[int],
        *,
        n_slots: int,
        chunk_tokens: int,
        max_waiting: int,
        prefixes: Sequence[Prefix] = (),
    ) -> None:
        """Set the cache aside.

        Args:
            model: in evaluation mode.
            stop_ids: tokens that end an answer.
            n_slots: answers that are made at once.
            chunk_tokens: prompt tokens read per step, so that no prompt stalls the others.
            max_waiting: requests that may wait for a slot.
            prefixes: starts that many prompts share, with their keys and values.
        """
        self._model, self._stop_ids = model, frozenset(stop_ids)
        self._device = model.rope_cos.device
        self.scheduler: Scheduler[Request] = Scheduler(
            n_slots, chunk_tokens, max_waiting, [prefix.ids for prefix in prefixes]
        )
        self._cache = SlotCache(
            model.config, n_slots + len(prefixes), cache_dtype(model), self._device
        )
        for i, prefix in enumerate(prefixes):
            self._cache.store(n_slots + i, prefix.keys, prefix.values)

    def submit(self, request: Request) -> None:
        """Let a request wait for a slot.

        Raises:
            DataError: the prompt is empty or fills the model's context.
            QueueFullError: too many wait already.
        """
        check_prompt(self._model, request.ids)
        self.scheduler.submit(request)

    def cancel(self, request: Request) -> None:
        """End a request now; its slot is free for the next step."""
        self.scheduler.release(request)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return self.scheduler.n_running + self.scheduler.n_waiting == 0

    def step(self) -> list[Made]:
        """Admit who fits, read some prompts, make a token for everyone whose prompt is read."""
        for admission in self.scheduler.admit():
            job = admission.job
            if job.slot is not None and admission.source != job.slot:
                self._cache.copy(admission.source, job.slot, job.n_shared)
            self._prepare(job)
        step = self.scheduler.plan()
        ready: list[Request] = []
        rows: list[Tensor] = []
        with torch.inference_mode():
            if step.decode:
                rows.append(self._decode(step.decode))
                ready += step.decode
            for chunk in step.prefill:
                logits_1V = self._prefill(chunk.job, chunk.end)
                if logits_1V is not None:
                    rows.append(logits_1V)
                    ready.append(chunk.job)
            return self._take(ready, torch.cat(rows)) if ready else []

    def _prepare(self, request: Request) -> None:
        """Give a request its own draws and, if it needs one, its memory of tokens."""
        sampling = request.sampling
        if sampling.temperature > 0:
            request.generator = torch.Generator(self._device).manual_seed(sampling.seed)
        if sampling.repetition_penalty != 1:
            size = self._model.config.vocab_size
            request.seen = torch.zeros(size, dtype=torch.bool, device=self._device)
            request.seen[torch.tensor(request.ids, device=self._device)] = True

    def _prefill(self, request: Request, end: int) -> Tensor | None:
        """Read a part of a prompt; return the logits after it, (1, V), if it was the last part."""
        start = request.n_cached
        assert request.slot is not None
        cache = self._cache.rows(request.slot, [start])
        ids = torch.tensor([request.ids[start:end]], device=self._device)
        self.scheduler.read(request, end)
        if end == len(request.ids):
            return self._model.next_logits(ids, cache)
        self._model.hidden(ids, cache=cache)
        return None

    def _decode(self, requests: Sequence[Request]) -> Tensor:
        """Read everyone's last token in one pass; return the logits, (requests, V).

        Slots in between that are not decoding come along with token 0 at their next free position,
        which is overwritten before it is looked at: cheaper than gathering everyone's keys.
        """
        slots = [request.slot for request in requests if request.slot is not None]
        first, ids = slots[0], [0] * (slots[-1] - slots[0] + 1)
        for request, slot in zip(requests, slots, strict=True):
            ids[slot - first] = request.ids[-1]
        starts = [self.scheduler.stored(slot) for slot in range(first, slots[-1] + 1)]
        cache = self._cache.rows(first, starts)
        ids_B1 = torch.tensor(ids, device=self._device)[:, None]
        logits_BV = self._model.next_logits(ids_B1, cache)
        for request in requests:
            self.scheduler.read(request, len(request.ids))
        if len(slots) < len(ids):
            return logits_BV[torch.tensor(slots, device=self._device) - first]
        return logits_BV

    def _take(self, requests: Sequence[Request], logits_BV: Tensor) -> list[Made]:
        """Choose everyone's next token and end those who are done."""
        made = []
        for i, token in enumerate(self._choose(requests, _guided(requests, logits_BV))):
            request = requests[i]
            if token in self._stop_ids:
                request.reason = "stop"
                made.append(Made(request, None, None))
            else:
                n_top, logprob = request.n_top_logprobs, None
                if n_top is not None:
                    logprob = token_logprob(logits_BV[i], token, n_top)
                request.ids.append(token)
                if request.guide is not None:
                    request.guide.take(token)
                if request.seen is not None:
                    request.seen[token] = True
                request.reason = self._limit(request)
                made.append(Made(request, token, logprob))
            if request.reason is not None:
                self.scheduler.release(request)
        return made

    def _limit(self, request: Request) -> StopReason | None:
        """Return the limit that a request has reached, if one."""
        if len(request.ids) - len(request.prompt_ids) >= request.sampling.max_new_tokens:
            return "length"
        return "context" if len(request.ids) >= self._model.config.max_seq_len else None

    def _choose(self, requests: Sequence[Request], logits_BV: Tensor) -> list[int]:
        """Return a token per request; those with the same filters go through them together."""
        groups: dict[SamplingParams, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request.filters, []).append(i)
        tokens = [0] * len(requests)
        for sampling, members in groups.items():
            rows_BV = logits_BV[members] if len(groups) > 1 else logits_BV
            seen = [seen_V for i in members if (seen_V := requests[i].seen) is not None]
            filtered_BV = next_logits(rows_BV, torch.stack(seen) if seen else None, sampling)
            if sampling.temperature == 0:
                chosen = likeliest(filtered_BV)
            else:
                chosen = [
                    draw(p_1V, requests[i].generator)[0]
                    for i, p_1V in zip(members, filtered_BV.softmax(-1)[:, None], strict=True)
                ]
            for i, token in zip(members, chosen, strict=True):
                tokens[i] = token
        return tokens


def _guided(requests: Sequence[Request], logits_BV: Tensor) -> Tensor:
    """Return the logits, -inf where a request's guide refuses a token."""
    guides = [(i, request.guide) for i, request in enumerate(requests) if request.guide is not None]
    if not guides:
        return logits_BV
    refused_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for i, guide in guides:
        refused_BV[i] = ~guide.allowed().to(logits_BV.device)
    return logits_BV.masked_fill(refused_BV, -torch.inf)
