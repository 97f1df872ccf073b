"""One process per measured model, so that each has a peak memory of its own.

All stay alive and are asked in turn: what slows the machine down for a moment then meets every
model, not one of them.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from tinyllm.evaluation.hardware import peak_memory_bytes
from tinyllm.evaluation.runners import OpenRunner, Runner

CLOSE_TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """What a worker tells when its model is there."""

    memory_before_bytes: int
    """Peak of the process before the model: interpreter and libraries."""


class Worker:
    """A process that holds one open model; use as a context."""

    def __init__(self, open_runner: OpenRunner, n_threads: int) -> None:
        """Start the process; it opens the model while the caller goes on.

        Args:
            open_runner: a picklable function or partial.
            n_threads: for torch in that process.
        """
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's memory
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, open_runner, n_threads), daemon=True
        )
        self._process.start()
        theirs.close()

    def opened(self) -> Opened:
        """Wait until the model is open."""
        opened: Opened = self._receive()
        return opened

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(runner, *arguments)`, computed in the process.

        Raises:
            Whatever the function raises there.
        """
        self._connection.send((function, arguments))
        return self._receive()

    def peak_memory_bytes(self) -> int:
        """Return the most memory that the process has held so far."""
        peak: int = self.ask(_peak_memory_bytes)
        return peak

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()  # the process ends when it has nothing to read
        self._process.join(CLOSE_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> Any:
        """Return the next answer, or raise the error that came instead."""
        try:
            answer, error = self._connection.recv()
        except EOFError:
            self._process.join(CLOSE_TIMEOUT_S)
            raise RuntimeError(
                f"a benchmark process died, exit code {self._process.exitcode}; out of memory?"
            ) from None
        if error is not None:
            raise error
        return answer


def _serve(connection: Connection, open_runner: OpenRunner, n_threads: int) -> None:
    """Open the model, then answer until the other side closes."""
    torch.set_num_threads(n_threads)
    try:
        before = peak_memory_bytes()
        runner = open_runner()
        connection.send((Opened(memory_before_bytes=before), None))
        while True:
            function, arguments = connection.recv()
            connection.send((function(runner, *arguments), None))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:  # crosses over and is raised where the question was asked
        connection.send((None, error))


def _peak_memory_bytes(runner: Runner) -> int:
    """Return the peak of this process; the model itself is not needed."""
    return peak_memory_bytes()
