"""Who computes next: plain bookkeeping of requests and cache slots, without torch.

A request waits, takes a free slot of the cache, has its prompt read in chunks, then gets a token
per step until it ends. A slot remembers which tokens its keys and values belong to, also when it is
free again, so that a request which starts like an earlier one begins where they part.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tinyllm.errors import TinyllmError

LEAST_SHARED = 8
"""Tokens that must be shared to prefer a slot for its past: any two chats begin with a few."""


class QueueFullError(TinyllmError):
    """More requests wait than the queue takes."""


@dataclass(kw_only=True, slots=True, eq=False)
class Job:
    """One sequence on its way through the scheduler."""

    prompt_ids: Sequence[int]
    """At least one token."""
    client: str = ""
    """Who asks; clients take turns in the queue."""
    ids: list[int] = field(init=False)
    """Prompt and answer so far."""
    slot: int | None = field(default=None, init=False)
    """Where its keys and values are; None while it waits and when it has ended."""
    n_cached: int = field(default=0, init=False)
    """How many of `ids` have their keys and values stored."""
    n_shared: int = field(default=0, init=False)
    """How many of them were taken over from an earlier sequence."""

    def __post_init__(self) -> None:
        """Begin with the prompt."""
        self.ids = list(self.prompt_ids)


J = TypeVar("J", bound=Job)


@dataclass(frozen=True, slots=True)
class Admission(Generic[J]):
    """A job that has just got a slot."""

    job: J
    source: int
    """The slot whose first `job.n_shared` positions it takes over; its own: nothing to copy."""


@dataclass(frozen=True, slots=True)
class Chunk(Generic[J]):
    """A part of a prompt to be read in one pass: `job.ids[job.n_cached : end]`."""

    job: J
    end: int


@dataclass(frozen=True, slots=True)
class Step(Generic[J]):
    """What to compute next."""

    prefill: tuple[Chunk[J], ...]
    decode: tuple[J, ...]
    """Jobs whose last token is to be read, in one pass, by slot."""


class Scheduler(Generic[J]):
    """Slots, queue and turns.

    `submit`, then in turn `admit`, `plan` and, after the passes, `read`; `release` at any time.
    """

    def __init__(
        self, n_slots: int, chunk_tokens: int, max_waiting: int, pinned: Sequence[Sequence[int]]
    ) -> None:
        """Begin with free slots.

        Args:
            n_slots: sequences that are computed at once.
            chunk_tokens: prompt tokens that are read per step; the others wait for no longer.
            max_waiting: requests that may wait.
            pinned: tokens of the slots behind the others, which hold shared starts for ever.
        """
        self.n_slots, self.chunk_tokens, self.max_waiting = n_slots, chunk_tokens, max_waiting
        self._free = dict.fromkeys(range(n_slots))  # in the order in which they became free
        self._past: list[Sequence[int]] = [*((),) * n_slots, *pinned]
        self._waiting: OrderedDict[str, deque[J]] = OrderedDict()
        self._running: dict[int, J] = {}
        self._prefilling: deque[J] = deque()

    @property
    def n_waiting(self) -> int:
        """Requests without a slot."""
        return sum(map(len, self._waiting.values()))

    @property
    def n_running(self) -> int:
        """Slots in use."""
        return self.n_slots - len(self._free)

    def submit(self, job: J) -> None:
        """Let a job wait for a slot.

        Raises:
            QueueFullError: too many wait already.
        """
        if self.n_waiting - len(self._free) >= self.max_waiting:
            raise QueueFullError(f"queue: {self.max_waiting} requests wait already; try later")
        self._waiting.setdefault(job.client, deque()).append(job)

    def admit(self) -> Iterator[Admission[J]]:
        """Yield jobs as they get free slots: each client's oldest, one client after the other.

        Copy what an admission asks for before asking for the next one.
        """
        while self._free and self._waiting:
            client, jobs = next(iter(self._waiting.items()))
            job = jobs.popleft()
            del self._waiting[client]
            if jobs:
                self._waiting[client] = jobs  # behind the other clients
            yield self._place(job)

    def plan(self) -> Step[J]:
        """Return the next passes: prompts take turns, the first gets what others leave over."""
        chunks, room = [], self.chunk_tokens
        for _ in range(len(self._prefilling)):
            if room == 0:
                break
            job = self._prefilling.popleft()
            n = min(room, len(job.ids) - job.n_cached)
            chunks.append(Chunk(job, job.n_cached + n))
            room -= n
            self._prefilling.append(job)
        running = sorted(self._running.items())
        return Step(tuple(chunks), tuple(job for _, job in running if is_read(job)))

    def read(self, job: J, end: int) -> None:
        """Note that `job.ids[:end]` have their keys and values in its slot."""
        if not is_read(job) and end >= len(job.prompt_ids):
            self._prefilling.remove(job)
        job.n_cached = end

    def release(self, job: J) -> None:
        """Take a job out, wherever it is; its slot is free at once and remembers its tokens."""
        if job.slot is not None:
            del self._running[job.slot]
            if not is_read(job):
                self._prefilling.remove(job)
            self._past[job.slot] = job.ids[: job.n_cached]
            self._free[job.slot] = None
            job.slot = None
        elif job in (jobs := self._waiting.get(job.client, deque())):
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.client]

    def stored(self, slot: int) -> int:
        """Return how many positions of a slot must not be overwritten."""
        job = self._running.get(slot)
        return len(self._past[slot]) if job is None else job.n_cached

    def _place(self, job: J) -> Admission[J]:
        """Give a job the slot that begins like it, or the one free for longest, to copy to."""
        longest = len(job.ids) - 1  # the last token is read for its logits
        shared = {
            slot: min(longest, shared_start(self._tokens(slot), job.ids))
            for slot in range(len(self._past))
        }
        source = max(shared, key=lambda slot: (shared[slot], slot in self._free, -slot))
        if shared[source] < LEAST_SHARED:
            source = next(iter(self._free))
            shared[source] = 0
        slot = source if source in self._free else next(iter(self._free))
        del self._free[slot]
        job.slot, job.n_cached, job.n_shared = slot, shared[source], shared[source]
        self._running[slot] = job
        self._prefilling.append(job)
        return Admission(job, source)

    def _tokens(self, slot: int) -> Sequence[int]:
        """Return the tokens whose keys and values a slot holds now."""
        job = self._running.get(slot)
        if job is not None:
            return job.ids[: job.n_cached]
        return self._past[slot]


def is_read(job: Job) -> bool:
    """Whether the whole prompt has its keys and values."""
    return job.n_cached >= len(job.prompt_ids)


def shared_start(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences share from the start: [1, 2], [1, 3, 2] gives 1."""
    for i, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return i
    return min(len(first), len(second))
