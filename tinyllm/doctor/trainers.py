"""Training processes: the ones that lost the DVC command that started them.

A trainer holds the flock of `.inflight/<stage>/<run>/.lock`. The holders are read from the kernel's
table, so that looking never takes a lock from a trainer that is just starting.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

from tinyllm.doctor.finding import Finding, problem
from tinyllm.doctor.leftovers import is_dvc

LOCK_TABLE = Path("/proc/locks")


def examine_trainers(inflight: Path) -> Iterator[Finding]:
    """Return the trainers of unfinished runs; those that DVC started and left are problems.

    Args:
        inflight: `paths.inflight_root()`.
    """
    holders = _flock_holders()
    for lock in sorted(inflight.glob("*/*/.lock")):
        pid = holders.get(lock.stat().st_ino)
        if pid is None:
            continue
        run = lock.parent.relative_to(inflight)
        if _is_orphan(pid):
            text = f"process {pid} trains {run}, but the dvc that started it is gone"
            yield problem(
                "dvc", text, f"kill {pid}  # it saves first; dvc repro goes on from there"
            )
        else:
            yield Finding(section="dvc", text=f"process {pid} trains {run}")


def _flock_holders() -> dict[int, int]:
    """Return the process that holds a flock by the inode of the file; empty where not known."""
    try:
        lines = LOCK_TABLE.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    # 1: FLOCK  ADVISORY  WRITE 4242 08:01:393219 0 EOF; waiting ones have "->" in the second column
    words = [line.split() for line in lines]
    return {int(row[5].rpartition(":")[2]): int(row[4]) for row in words if row[1] == "FLOCK"}


def _is_orphan(pid: int) -> bool:
    """Return whether DVC started a process and is not among its ancestors any more."""
    try:
        process = psutil.Process(pid)
        if "DVC_STAGE" not in process.environ():
            return False
        return not any(is_dvc(ancestor) for ancestor in process.parents())
    except psutil.Error:
        return False
