"""Where an unfinished training run is kept: a kill at any moment loses little, breaks nothing.

    .inflight/<stage>/<digest of the identity>/
        .lock                flock of the one trainer that may work here; the kernel frees it
        identity.json        the identity whole, for messages and comparison
        step-000400/         state.pt, manifest.json with the SHA-256 of every file;
                             shards/ if each rank held a part of the model
        .tmp-...             a checkpoint being written; never taken for one

Not an output of DVC: DVC removes or reverts outputs before a stage starts. Knows nothing about what
a state holds beyond its step.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from tinyllm.artifact import digest_json, file_sha256, list_files, write_json
from tinyllm.errors import TrainingError
from tinyllm.progress import Progress
from tinyllm.training.parallel import Team
from tinyllm.training.sharded_state import SHARDS, take_parts, write_parts

State = dict[str, Any]

KEEP_CHECKPOINTS = 2
KEEP_IDENTITIES = 3
LOCK, IDENTITY, STATE, MANIFEST = ".lock", "identity.json", "state.pt", "manifest.json"
SHOWN_DIFFERENCES = 4


class Store:
    """The checkpoints of one run; made by `open_store`, which holds the lock."""

    def __init__(
        self, directory: Path, identity: Mapping[str, Any], progress: Progress, team: Team
    ) -> None:
        self.directory = directory
        self.identity = identity
        self.progress = progress
        self.team = team
        self.last_step: int | None = None
        """Step of the newest checkpoint that is known to be good."""

    def load(self) -> State | None:
        """Return the newest valid state, or None; damaged ones are named and passed over.

        Rank 0 chooses, the others read what it chose.
        """
        state = self._newest() if self.team.is_main else None
        self.last_step = self.team.tell(None if state is None else int(state["step"]))
        if self.last_step is not None and not self.team.is_main:
            state = self._read(self._folder(self.last_step))
        return state

    def save(self, state: State) -> None:
        """Write a checkpoint, then remove all but the last two; every rank of a team calls this.

        A full disk is a warning: training goes on and the previous checkpoint stays.
        """
        step = int(state["step"])
        temporary = self.directory / f".tmp-{step}"
        rest, parts = take_parts(state)

        def prepare() -> None:
            """Make an empty folder to write into."""
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()

        def finish() -> None:
            """Write the rest and give the folder its name: from here on it is a checkpoint."""
            self._write(temporary, rest)
            shutil.rmtree(self._folder(step), ignore_errors=True)  # an invalid one of the same step
            temporary.rename(self._folder(step))
            _sync(self.directory)

        work = [(prepare, self.team.is_main), (finish, self.team.is_main)]
        if parts:
            work.insert(1, (lambda: write_parts(temporary / SHARDS, parts), True))
        for do, mine in work:
            reason = _try(do) if mine else ""
            if self.team.largest(bool(reason)):  # one who failed stops all
                self._give_up(step, temporary, reason or "another rank could not write")
                return
        self.last_step = step
        if self.team.is_main:
            for old in self._checkpoints()[:-KEEP_CHECKPOINTS]:
                shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        """Forget every checkpoint."""
        for path in self._checkpoints() if self.team.is_main else ():
            shutil.rmtree(path)
        self.last_step = None

    def prune_others(self) -> None:
        """Remove the oldest runs of this stage beyond the newest three; never one in use."""
        if not self.team.is_main:
            return
        runs = sorted(_runs(self.directory.parent), key=_changed_s)
        for run in runs[:-KEEP_IDENTITIES]:
            if run != self.directory and not _is_locked(run):
                shutil.rmtree(run, ignore_errors=True)

    def differences(self) -> list[str]:
        """Return where the identity of each other stored run differs, the newest run first."""
        lines = []
        for run in sorted(_runs(self.directory.parent), key=_changed_s, reverse=True):
            if run == self.directory:
                continue
            try:
                other = json.loads((run / IDENTITY).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            steps = [int(path.name.removeprefix("step-")) for path in run.glob("step-*")]
            lines.append(f"at step {max(steps, default=0)}: {describe(other, self.identity)}")
        return lines

    def _folder(self, step: int) -> Path:
        """Return where the checkpoint of a step is."""
        return self.directory / f"step-{step:06d}"

    def _checkpoints(self) -> list[Path]:
        """Return the folders of finished checkpoints, oldest first."""
        return sorted(self.directory.glob("step-*"))

    def _newest(self) -> State | None:
        """Return the newest valid state, or None."""
        for path in reversed(self._checkpoints()):
            try:
                return self._read(path)
            except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.progress.say(f"checkpoint {path.name} is damaged ({reason}); passed over")
        return None

    def _give_up(self, step: int, temporary: Path, reason: str) -> None:
        """Warn that a checkpoint could not be written and remove what there is of it."""
        if self.team.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = "none yet" if self.last_step is None else f"step {self.last_step}"
        self.progress.say(
            f"warning: no checkpoint at step {step}: {reason}; training goes on,"
            f" last good checkpoint: {kept}"
        )

    def _write(self, folder: Path, state: State) -> None:
        """Write the state and the hashes of all files, all on the disk when this returns."""
        torch.save({**state, "identity": _canonical(self.identity)}, folder / STATE)
        hashes = {name: file_sha256(folder / name) for name in list_files(folder)}
        write_json(folder / MANIFEST, {"step": state["step"], "files": hashes})
        for path in (*map(folder.joinpath, hashes), folder / MANIFEST, folder / SHARDS, folder):
            if path.exists():
                _sync(path)

    def _read(self, folder: Path) -> State:
        """Return the state of a checkpoint whose hashes and identity are right."""
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            if file_sha256(folder / name) != expected:
                raise ValueError("its bytes differ from its hash")
        state: State = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        if state["identity"] != _canonical(self.identity):
            raise ValueError("it belongs to another run")
        return {**state, SHARDS: str(folder / SHARDS)} if (folder / SHARDS).exists() else state


@contextmanager
def open_store(
    root: Path, stage: str, identity: Mapping[str, Any], progress: Progress, team: Team
) -> Iterator[Store]:
    """Take the lock of a run and yield its store.

    Args:
        root: `paths.inflight_root()`.
        stage: the stage's name.
        identity: JSON values; everything that shapes the trajectory.
        progress: where warnings go.
        team: rank 0 takes the lock for all.

    Raises:
        TrainingError: another process trains this run now.
    """
    directory = root / stage / digest_json(identity)[:16]
    if not team.is_main:
        yield Store(directory, identity, progress, team)
        return
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"{directory}: another process trains this very run; wait for it or stop it"
            ) from None
        for leftover in directory.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        write_json(directory / IDENTITY, identity)
        yield Store(directory, identity, progress, team)


def describe(old: Any, new: Any) -> str:
    """Return where two identities differ: `pretrain.lr 0.003 -> 0.01`, at most four of them."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    keys = [
        key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)
    ]
    shown = [
        f"{key} {_short(before.get(key))} -> {_short(after.get(key))}"
        for key in keys[:SHOWN_DIFFERENCES]
    ]
    if len(keys) > SHOWN_DIFFERENCES:
        shown.append(f"and {len(keys) - SHOWN_DIFFERENCES} more")
    return ", ".join(shown) or "nothing"


def _try(do: Callable[[], None]) -> str:
    """Return why a piece of writing failed, or nothing.

    torch.save raises RuntimeError on a full disk, not OSError; torch.distributed.checkpoint has an
    exception of its own, which is no Exception.
    """
    try:
        do()
    except (OSError, RuntimeError, CheckpointException) as error:
        return str(error).splitlines()[0] or type(error).__name__
    return ""


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield leaves with their dotted paths; the level `params` is left out."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            below = path if not path and key == "params" else f"{path}.{key}" if path else str(key)
            yield from _flatten(item, below)
    else:
        yield path, value


def _canonical(identity: Mapping[str, Any]) -> str:
    """Return an identity as text that is equal when the identities are."""
    return json.dumps(identity, sort_keys=True)


def _short(value: Any) -> str:
    """Return a value for a message; hashes by their first digits."""
    text = "absent" if value is None else str(value)
    return text[:8] if len(text) == 64 else text


def _runs(stage_directory: Path) -> list[Path]:
    """Return the folders of all runs of a stage."""
    return [path.parent for path in stage_directory.glob(f"*/{IDENTITY}")]


def _changed_s(run: Path) -> float:
    """Return when a run last began or stored something."""
    try:
        return max(run.stat().st_mtime, (run / IDENTITY).stat().st_mtime)
    except FileNotFoundError:
        return 0.0


def _is_locked(run: Path) -> bool:
    """Return whether a trainer works there now."""
    try:
        with (run / LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _sync(path: Path) -> None:
    """Wait until a file or a folder's names are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
