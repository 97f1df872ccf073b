"""The command line on a pseudo-terminal."""

import os
import pty
import re
import select
import signal
import sys
import time

import pytest

COMMAND = [sys.executable, "-m", "tinyllm.cli"]
ENVIRONMENT = {**os.environ, "TINYLLM_DEVICE": "cpu", "TINYLLM_THREADS": "1", "TERM": "dumb"}
PATIENCE_S = 120
"""How long a process may take to start, answer or end; a busy machine needs most of a minute."""


class Terminal:
    """A process on a pseudo-terminal, typed at and read from.

    It inherits an ignored SIGINT, as from a test run that a script has put into the background.
    """

    def __init__(self, *arguments) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.execve(sys.executable, [*COMMAND, *map(str, arguments)], ENVIRONMENT)
        self.text = ""

    def wait_for(self, pattern: str, seconds: float = PATIENCE_S) -> str:
        """Return everything up to a pattern and forget it."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.text!r}"
            try:
                data = os.read(self.fd, 4096)
            except OSError:  # the other side is closed
                data = b""
            assert data, f"ended without {pattern!r}: {self.text!r}"
            self.text += data.decode(errors="replace")
        head, self.text = self.text[: match.end()], self.text[match.end() :]
        return head

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def leave(self, key: str) -> int:
        """Type a key until the process ends; return its exit code.

        Again and again: a signal between the prompt and readline's wait is seen one key later.
        """
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            self.type(key)
            while select.select([self.fd], [], [], 0.5)[0]:
                try:
                    if os.read(self.fd, 4096):
                        continue
                except OSError:  # the other side is closed
                    pass
                os.close(self.fd)
                return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.kill(self.pid, signal.SIGKILL)
        pytest.fail(f"still there after {key!r}")
