"""Running servers for tests: real processes on real sockets."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_dirs import write_model_dir

PATIENCE_S = 60
"""How long a test waits for what must come; a busy machine is ten times slower than an idle one."""


@dataclass
class Server:
    process: subprocess.Popen
    address: str
    model_dir: Path
    log: list[str]

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])


@contextmanager
def running_server(model_dir: Path, cache: Path, *options: str, **environment) -> Iterator[Server]:
    settings = {"TINYLLM_DEVICE": "cpu", "TINYLLM_THREADS": "1", "TINYLLM_CACHE": str(cache)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyllm.cli", "serve", str(model_dir), "--port", "0", *options],
        env={**os.environ, **settings, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        log: list[str] = []
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"serving at (http://\S+)", line):
                break
        else:
            pytest.fail("the server did not start: " + "".join(log))
        threading.Thread(target=lambda: log.extend(process.stderr), daemon=True).start()
        yield Server(process, found[1], model_dir, log)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(PATIENCE_S)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return write_model_dir(tmp_path_factory.mktemp("models") / "tiny", max_seq_len=2048)


@pytest.fixture(scope="session")
def server(model_dir, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    options = "--slots 4 --grace-seconds 60"
    with running_server(model_dir, cache, *options.split(), "--system", "Be brief.") as running:
        yield running
        assert not [line for line in running.log if "Traceback" in line]


@pytest.fixture(scope="session")
def strict(model_dir, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    options = "--slots 1 --queue 1 --max-seconds 120 --max-body-bytes 5000 --grace-seconds 1"
    with running_server(model_dir, cache, *options.split(), TINYLLM_API_KEY="sesame") as running:
        yield running


def open_stream(server, max_tokens: int = 2000) -> socket.socket:
    """Return a connection whose answer has begun."""
    messages = [{"role": "user", "content": "Hello there"}]
    wanted = {"model": "tiny", "messages": messages, "stream": True, "temperature": 0}
    body = json.dumps({**wanted, "max_tokens": max_tokens}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sesame\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
    connection.sendall(head.encode() + body)
    received = b""
    while received.count(b"data: ") < 3:
        received += connection.recv(4096)
    return connection
