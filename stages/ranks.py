"""Starts the ranks of a training stage: `TINYLLM_NPROC=2 dvc repro` trains with two processes.

They are started by torchrun's own launcher, each as `python -m stages.<name>`; what they do
together is in `tinyllm/training/parallel.py`. One mistake is one line, whoever made it: a rank
hands its message to the launcher, which prints the first.
"""

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from tinyllm.errors import Interrupted, TinyllmError

N_RANKS = "TINYLLM_NPROC"
STARTER = "TINYLLM_STARTER"
"""Pid of the launcher, for its ranks: without it they end (`tinyllm/training/stop.py`)."""
SHUTDOWN_S = 600
"""How long ranks may finish a step and save after a signal before they are killed."""


def is_rank() -> bool:
    """Return whether this process was started as one of several."""
    return "RANK" in os.environ


def is_main() -> bool:
    """Return whether this process talks to people: the only one, or rank 0."""
    return os.environ.get("RANK", "0") == "0"


def ranks_wanted() -> int:
    """Return how many ranks to start here; 0: this process does the work itself.

    Raises:
        TinyllmError: `TINYLLM_NPROC` is not a number of processes.
    """
    given = os.environ.get(N_RANKS, "")
    if is_rank() or not given:
        return 0
    if not given.isdecimal() or int(given) < 1:
        raise TinyllmError(f"{N_RANKS}: {given!r} is not a number of processes")
    return int(given)


def hand_over(message: str) -> bool:
    """Give a mistake's message to the launcher that started this rank; false: nobody to give to."""
    told = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if STARTER not in os.environ or not told:
        return False
    written = Path(f"{told}.tmp")  # the launcher may look, or stop this rank, at any moment
    written.write_text(json.dumps({"message": message}), encoding="utf-8")
    written.replace(told)
    return True


def start_ranks(module: str, n_ranks: int) -> NoReturn:
    """Run a module as several ranks and leave with their code.

    Raises:
        TinyllmError: a rank made a mistake or was killed.
        Interrupted: ranks were stopped; rank 0 has said why.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # torch's launcher tells at length what we say in a line
    os.environ[STARTER] = str(os.getpid())
    with tempfile.TemporaryDirectory(prefix="tinyllm-ranks-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=n_ranks,
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            shutdown_timeout=SHUTDOWN_S,
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *sys.argv[1:])
        except SignalException as stopped:
            raise Interrupted("", code=128 + stopped.sigval) from None
        except ChildFailedError as failed:
            failures = failed.failures.items()
            _blame({rank: (f.exitcode, _message(f.error_file)) for rank, f in failures})
    raise SystemExit(0)


def _message(file: str) -> str:
    """Return what a rank handed over, or nothing."""
    try:
        return str(json.loads(Path(file).read_text(encoding="utf-8"))["message"])
    except (OSError, ValueError, KeyError):
        return ""


def _blame(failures: Mapping[int, tuple[int, str]]) -> NoReturn:
    """Raise what the first cause deserves: a rank that only lost its peer is not it.

    Args:
        failures: exit code, negative for a signal, and message of the ranks that failed.
    """
    for _, message in failures.values():
        if message:
            raise TinyllmError(message)
    for rank, (code, _) in failures.items():
        if code < 0 and -code != signal.SIGTERM:  # that one the launcher sends
            raise Interrupted(
                f"rank {rank} was killed by {signal.Signals(-code).name};"
                " run again to go on from the last checkpoint",
                code=128 - code,
            )
    codes = [code for code, _ in failures.values() if code > 0]
    raise Interrupted("", code=max(codes, default=1))
