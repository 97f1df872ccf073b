"""The scheduler alone: no model, no torch."""

import ast
import random
from pathlib import Path

import pytest

from tinyllm.inference import scheduler as module
from tinyllm.inference.scheduler import Job, QueueFullError, Scheduler, shared_start


def job(start: int, n: int, client: str = "") -> Job:
    return Job(prompt_ids=list(range(start, start + n)), client=client)


def scheduler(n_slots=2, chunk=4, waiting=9, pinned=()) -> Scheduler[Job]:
    return Scheduler(n_slots, chunk, waiting, pinned)


def run_step(s: Scheduler[Job]) -> tuple[list[tuple[Job, int]], list[Job]]:
    """Do what an engine does, with made-up tokens."""
    list(s.admit())
    step = s.plan()
    for j in step.decode:
        s.read(j, len(j.ids))
        j.ids.append(-1)
    for chunk in step.prefill:
        s.read(chunk.job, chunk.end)
        if chunk.end == len(chunk.job.ids):
            chunk.job.ids.append(-1)
    return [(chunk.job, chunk.end) for chunk in step.prefill], list(step.decode)


def test_it_knows_no_torch():
    tree = ast.parse(Path(module.__file__).read_text())
    imports = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert "tinyllm.errors" in imports
    assert not any("torch" in name for name in imports)


def test_a_long_prompt_is_read_in_chunks_while_others_decode():
    s = scheduler()
    short, long = job(0, 2), job(100, 10)
    s.submit(short)
    run_step(s)
    s.submit(long)
    assert run_step(s) == ([(long, 4)], [short])
    assert run_step(s) == ([(long, 8)], [short])
    assert run_step(s) == ([(long, 10)], [short])
    assert run_step(s) == ([], [short, long])


def test_prompts_take_turns_so_that_a_short_one_passes_a_long_one():
    s = scheduler(n_slots=3)
    long, short = job(0, 40), job(100, 3)
    s.submit(long)
    s.submit(short)
    assert run_step(s)[0] == [(long, 4)]
    assert run_step(s)[0] == [(short, 3), (long, 5)]


def test_clients_take_turns_in_the_queue():
    s = scheduler(n_slots=1)
    greedy = [job(i * 100, 2, "greedy") for i in range(4)]
    for j in greedy:
        s.submit(j)
    modest = job(900, 2, "modest")
    s.submit(modest)
    order = []
    while s.n_waiting or s.n_running:
        run_step(s)
        running = next(j for j in (*greedy, modest) if j.slot is not None)
        order.append(running)
        s.release(running)
    assert order == [greedy[0], modest, *greedy[1:]]


def test_the_queue_refuses_what_it_cannot_hold():
    s = scheduler(n_slots=1, waiting=2)
    jobs = [job(i * 100, 2) for i in range(4)]
    for j in jobs[:3]:  # one for the free slot, two in the queue
        s.submit(j)
    with pytest.raises(QueueFullError, match="2 requests wait"):
        s.submit(jobs[3])
    s.release(jobs[1])
    s.submit(jobs[3])
    assert s.n_waiting == 3


def test_a_slot_is_taken_over_by_the_request_that_begins_like_it():
    s = scheduler(n_slots=3)
    first = job(0, 20)
    s.submit(first)
    for _ in range(6):
        run_step(s)
    s.release(first)
    slot_of_first = 0
    follow_up = Job(prompt_ids=[*first.ids, 5, 6])
    other = job(500, 20)
    s.submit(other)
    s.submit(follow_up)
    admitted = {a.job: a for a in s.admit()}
    assert admitted[other].job.slot != slot_of_first
    assert admitted[other].job.n_shared == 0
    assert (follow_up.slot, follow_up.n_shared) == (slot_of_first, len(first.ids) - 1)


def test_a_pinned_start_is_copied_and_never_given_away():
    s = scheduler(n_slots=2, pinned=[list(range(12))])
    jobs = [job(0, 15), job(0, 12), job(0, 5)]
    for j in jobs:
        s.submit(j)
    admitted = list(s.admit())
    assert admitted[0].source == 2  # the pinned one, behind the others
    assert [(a.job.slot, a.job.n_shared) for a in admitted] == [(0, 12), (1, 11)]
    s.release(jobs[0])
    (last,) = s.admit()
    assert (last.job, last.job.n_shared) == (jobs[2], 0)  # fewer than are worth it


def test_a_busy_slot_is_a_source_only_up_to_what_it_has_stored():
    s = scheduler(n_slots=2, chunk=9)
    s.submit(job(0, 30))
    run_step(s)
    s.submit(job(0, 30))
    (admission,) = s.admit()
    assert (admission.source, admission.job.slot, admission.job.n_shared) == (0, 1, 9)


def test_random_traffic_never_shares_a_slot_and_loses_nobody():
    rng = random.Random(0)
    s, alive, finished, submitted = scheduler(n_slots=4, chunk=6, waiting=5), [], 0, 0
    for _ in range(600):
        if rng.random() < 0.5:
            j = job(rng.choice([0, 0, 50]), rng.randint(1, 30), rng.choice("ab"))
            try:
                s.submit(j)
                alive.append(j)
                submitted += 1
            except QueueFullError:
                assert s.n_waiting >= 5
        run_step(s)
        slots = [j.slot for j in alive if j.slot is not None]
        assert len(slots) == len(set(slots)) == s.n_running <= 4
        for j in [j for j in alive if len(j.ids) > len(j.prompt_ids) + 5 or rng.random() < 0.03]:
            s.release(j)
            alive.remove(j)
            finished += 1
    assert finished > 50
    for j in alive:
        s.release(j)
    assert (s.n_running, s.n_waiting) == (0, 0)


def test_shared_start():
    assert [shared_start(*pair) for pair in [([], [1]), ([1, 2], [1, 2, 3]), ([2], [1])]] == [
        0,
        2,
        0,
    ]
