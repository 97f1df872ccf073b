"""When a run must end early: a signal, or the death of the DVC process that started it.

The loop asks once per step, finishes the step, saves and leaves. A second signal leaves at once.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

CHECK_INTERVAL_S = 1.0


class Watch:
    """Knows whether the run should stop, and why."""

    def __init__(self, starter: psutil.Process | None) -> None:
        self._starter = starter
        self._next_check_s = 0.0
        self.code = 0
        """Exit code of the stop: 128 + signal, as shells count; 0 while there is no reason."""
        self.reason = ""
        """Why, for a message."""

    def should_stop(self) -> bool:
        """Return whether to save and leave now; cheap enough for every step."""
        now = time.monotonic()
        if not self.code and self._starter is not None and now >= self._next_check_s:
            self._next_check_s = now + CHECK_INTERVAL_S
            if not _is_alive(self._starter):
                self.code, self.reason = 128 + signal.SIGTERM, "dvc is gone"
        return self.code != 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take a signal: remember the first, end the process at the second."""
        if self.code:
            os._exit(128 + number)
        self.code, self.reason = 128 + number, signal.Signals(number).name


@contextmanager
def watch() -> Iterator[Watch]:
    """Yield a `Watch` that hears SIGTERM and SIGINT until the block ends."""
    watching = Watch(find_dvc() if "DVC_STAGE" in os.environ else None)
    if threading.current_thread() is not threading.main_thread():
        yield watching  # signals reach the main thread only
        return
    before = {
        number: signal.signal(number, watching.note) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield watching
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_dvc() -> psutil.Process | None:
    """Return the nearest ancestor that is dvc; a shell may stand between it and us."""
    for ancestor in psutil.Process().parents():
        try:
            words = ancestor.cmdline()
        except psutil.Error:
            continue
        if any(Path(word).name == "dvc" for word in words[:4]):
            return ancestor
    return None


def _is_alive(process: psutil.Process) -> bool:
    """Return whether it still runs: same pid, same start time, not waiting to be reaped."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
