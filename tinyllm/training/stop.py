"""When a run must end early: a signal, or the death of a process that started it.

The loop asks once per step, finishes the step, saves and leaves. A second signal leaves at once.
Ranks of one run ask each other and leave after the same step.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

CHECK_INTERVAL_S = 1.0


class Watch:
    """Knows whether the run should stop, and why."""

    def __init__(
        self,
        starters: Mapping[str, psutil.Process | None],
        agree: Callable[[int], int] = lambda code: code,
    ) -> None:
        """Prepare.

        Args:
            starters: processes without which the run ends, by a name for the message; None: gone.
            agree: the largest of all ranks' codes.
        """
        self._starters = starters
        self._agree = agree
        self._next_check_s = 0.0
        self._heard_signal = False
        self.code = 0
        """Exit code of the stop: 128 + signal, as shells count; 0 while there is no reason."""
        self.reason = ""
        """Why, for a message."""

    def should_stop(self) -> bool:
        """Return whether to save and leave now, the same on all ranks; cheap enough for a step."""
        now = time.monotonic()
        if not self.code and now >= self._next_check_s:
            self._next_check_s = now + CHECK_INTERVAL_S
            gone = [name for name, process in self._starters.items() if not _is_alive(process)]
            if gone:
                self.code, self.reason = 128 + signal.SIGTERM, f"{gone[0]} is gone"
        code = self._agree(self.code)
        if code and not self.code:
            self.code, self.reason = code, "another rank was stopped"
        return code != 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take a signal: remember the first, end the process at the second."""
        if self._heard_signal:
            os._exit(128 + number)
        self._heard_signal = True
        self.code, self.reason = 128 + number, signal.Signals(number).name


@contextmanager
def watch(agree: Callable[[int], int] = lambda code: code) -> Iterator[Watch]:
    """Yield a `Watch` that hears SIGTERM and SIGINT until the block ends; arguments as there."""
    watching = Watch(find_starters(), agree)
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


def find_starters() -> dict[str, psutil.Process | None]:
    """Return the processes whose death ends this one: dvc, and of a rank who started the ranks."""
    starters: dict[str, psutil.Process | None] = {}
    if "DVC_STAGE" in os.environ and (dvc := find_dvc()) is not None:
        starters["dvc"] = dvc
    if "RANK" in os.environ:
        parent = os.getppid()
        orphan = os.environ.get("TINYLLM_STARTER", str(parent)) != str(
            parent
        )  # it died while we began
        starters["the process that started the ranks"] = None if orphan else psutil.Process(parent)
    return starters


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


def _is_alive(process: psutil.Process | None) -> bool:
    """Return whether it still runs: same pid, same start time, not waiting to be reaped."""
    if process is None:
        return False
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
