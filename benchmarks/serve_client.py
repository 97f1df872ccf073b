"""`tinyllm serve` in a process of its own, and clients over bare sockets, which cost little."""

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

CLIENTS = 16
"""Streams at once."""


@dataclass(slots=True)
class Stream:
    """What a client saw."""

    status: int = 0
    text: str = ""
    asked_s: float = 0.0
    token_s: list[float] = field(default_factory=list)

    @property
    def first_ms(self) -> float:
        """From the call to the first token."""
        return 1e3 * (self.token_s[0] - self.asked_s)

    @property
    def between_ms(self) -> list[float]:
        """Between tokens."""
        return [1e3 * (after - before) for before, after in pairwise(self.token_s)]


@contextmanager
def running_server(
    model_dir: Path, cache: Path, threads: int
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run `tinyllm serve` on a free port."""
    command = [sys.executable, "-m", "tinyllm.cli", "serve", str(model_dir), "--port", "0"]
    settings = {"TINYLLM_THREADS": str(threads), "TINYLLM_DEVICE": "cpu"}
    waiting = {"OMP_WAIT_POLICY": "passive"}  # a spinning thread stalls a busy machine
    environment = {**waiting, **os.environ, **settings, "TINYLLM_CACHE": str(cache)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"serving at http://\S+:(\d+)", line):
                yield process, int(found[1])
                return
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait(30)


async def call(port: int, body: bytes, leave_after: int | None = None) -> Stream:
    """Post a body and read the events; leave after some tokens if told so."""
    stream = Stream(asked_s=time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    try:
        writer.write(head.encode() + body)
        stream.status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if line.startswith(b'data: {"id"'):
                choice = json.loads(line[6:])["choices"][0]
                stream.text += choice["text"]
                stream.token_s.append(time.perf_counter())
                if leave_after is not None and len(stream.token_s) >= leave_after:
                    break
    finally:
        writer.close()
    return stream


def body_of(name: str, prompt: list[int] | str, n_tokens: int, **more: int) -> bytes:
    """Return a greedy streaming call."""
    fields = {"model": name, "prompt": prompt, "max_tokens": n_tokens, "temperature": 0}
    return json.dumps({**fields, "stream": True, **more}).encode()


def latencies(streams: list[Stream]) -> dict[str, float]:
    """Return medians and 95th percentiles of the waits for and between tokens, in ms."""
    first = sorted(stream.first_ms for stream in streams)
    between = sorted(ms for stream in streams for ms in stream.between_ms)
    return {
        "first_token_ms_p50": round(statistics.median(first), 1),
        "first_token_ms_p95": round(first[int(0.95 * len(first))], 1),
        "between_tokens_ms_p50": round(statistics.median(between), 2),
        "between_tokens_ms_p95": round(between[int(0.95 * len(between))], 2),
    }


def n_equal(alone: list[Stream], together: list[Stream]) -> int:
    """Return how many answers are the same alone and in company."""
    return sum(one.text == other.text for one, other in zip(alone, together, strict=True))


async def read_metrics(port: int) -> dict[str, float]:
    """Return the server's metrics that are one number."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return {name: float(x) for name, x in re.findall(r"^(tinyllm_\w+) (\S+)$", text, re.M)}
