"""What a killed `dvc` or stage leaves behind, and the command that clears each.

Only looks: nothing is locked, changed or removed. docs/experiments.md tells how each comes about.
"""

import configparser
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tinyllm.doctor.finding import Finding, problem

EXEC_REFS, STASH_REF = "refs/exps/exec", "refs/exps/stash"
SHIPPED = ("dvc.yaml", "params.yaml", "pyproject.toml", "stages", "tinyllm", "kernels", "presets")
"""What an experiment in a folder of its own needs from Git."""
_TEMPORARY = re.compile(r"\.(\d+)(?:\.old)?\.tmp$")


def examine_repository(root: Path) -> list[Finding]:
    """Return what is wrong with the Git and DVC state of the folder of dvc.yaml."""
    if not (root / ".dvc").is_dir():
        text = f"{root.resolve()}: no DVC repository; nothing to examine"
        return [Finding(section="dvc", text=text)]
    dvc_runs = [process.pid for process in dvc_processes(root)]
    findings = [*_config(root), *_rwlock(root, dvc_runs), *_half_written(root)]
    if _git(root, "rev-parse", "--git-dir") is None:
        return [*findings, problem("dvc", "no Git repository: experiments need one", "git init")]
    findings += [*_index(root), *_stash(root), *_untracked(root)]
    if dvc_runs:
        text = f"dvc runs now (process {', '.join(map(str, dvc_runs))}); its state is not judged"
        findings.append(Finding(section="dvc", text=text))
    else:
        findings += [*_detached_head(root), *_temporary_experiments(root)]
    return findings


def examine_cache(root: Path) -> Iterator[Finding]:
    """Re-hash every object of DVC's cache; its name is its MD5."""
    n_objects = 0
    for path in sorted((root / ".dvc/cache/files/md5").glob("??/*")):
        n_objects += 1
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != path.parent.name + path.name.removesuffix(".dir"):
            yield problem(
                "dvc",
                f"{path}: changed since DVC stored it",
                f"rm -f {path} && dvc repro --force  # or dvc pull",
            )
    yield Finding(section="dvc", text=f"cache: {n_objects} objects read")


def dvc_processes(root: Path) -> list[psutil.Process]:
    """Return the running DVC commands of this repository."""
    found = []
    for process in psutil.process_iter():
        try:
            if is_dvc(process) and Path(process.cwd()).is_relative_to(root.resolve()):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def is_dvc(process: psutil.Process) -> bool:
    """Return whether a process is a DVC command."""
    words = process.cmdline()[:4]
    return any(Path(word).name == "dvc" for word in words) or words[1:3] == ["-m", "dvc"]


def _git(root: Path, *arguments: str) -> str | None:
    """Return what a Git command prints, None if it fails."""
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _config(root: Path) -> Iterator[Finding]:
    """Look for the switches that keep DVC from the network."""
    config = configparser.ConfigParser()
    config.read([root / ".dvc/config", root / ".dvc/config.local"], encoding="utf-8")
    for key in ("analytics", "check_update"):
        if config.get("core", key, fallback="true").lower() not in ("false", "0", "no", "off"):
            yield problem(
                "dvc", f"core.{key} is on: DVC calls home", f"dvc config core.{key} false"
            )


def _rwlock(root: Path, dvc_runs: list[int]) -> Iterator[Finding]:
    """Look for locks of processes that are gone, or whose number another program has now."""
    path = root / ".dvc/tmp/rwlock"
    if not path.exists():
        return
    try:
        holders = sorted(set(_pids(json.loads(path.read_text(encoding="utf-8")))))
    except (ValueError, AttributeError, TypeError):
        yield problem("dvc", f"{path}: not readable, DVC stops at it", f"rm {path}")
        return
    for pid in holders:
        if pid not in dvc_runs:
            state = "another program" if psutil.pid_exists(pid) else "dead"
            yield problem("dvc", f"{path}: held by process {pid}, which is {state}", f"rm {path}")


def _pids(rwlock: dict[str, Any]) -> Iterator[int]:
    """Yield the process numbers in DVC's lock file: path -> {write: entry, read: [entry, ...]}."""
    for entry in rwlock.values():
        writer = entry.get("write")
        for holder in [*([writer] if writer else []), *entry.get("read", [])]:
            yield int(holder["pid"])


def _index(root: Path) -> Iterator[Finding]:
    """Look for an index that an interrupt has emptied."""
    name = _git(root, "rev-parse", "--git-path", "index")
    index = root / name if name else None
    if index is not None and index.exists() and index.stat().st_size == 0:
        yield problem("dvc", f"{index}: empty", f"rm {index} && git reset")


def _stash(root: Path) -> Iterator[Finding]:
    """Look for an experiment that never started: the next `dvc exp run` would run it, too."""
    if _git(root, "rev-parse", "--verify", "--quiet", STASH_REF):
        yield problem(
            "dvc",
            f"{STASH_REF}: an interrupted experiment waits and would run with the next one",
            f"git update-ref -d {STASH_REF}",
        )
        if stashed := _git(root, "stash", "list"):
            n = len(stashed.splitlines())
            text = f"git stash has {n} entries; your edits may be among them: git stash list"
            yield Finding(section="dvc", text=text)


def _untracked(root: Path) -> Iterator[Finding]:
    """Look for files that `dvc exp run --temp` and `--queue` would miss."""
    listed = _git(root, "ls-files", "--others", "--exclude-standard", "--", *SHIPPED) or ""
    if names := listed.splitlines():
        shown = " ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        roots = sorted({name.split("/")[0] for name in names})
        text = f"untracked, so missing in --temp and --queue: {shown}"
        yield problem("dvc", text, f"git add {' '.join(roots)}")


def _detached_head(root: Path) -> Iterator[Finding]:
    """Look for a `dvc exp run` that was killed in the workspace."""
    refs = _git(root, "for-each-ref", "--format=%(refname)", EXEC_REFS)
    detached = _git(root, "symbolic-ref", "--quiet", "HEAD") is None
    if refs and detached:
        branches = (_git(root, "branch", "--format=%(refname:short)") or "").splitlines()
        names = [name for name in branches if not name.startswith("(")]
        branch = next((name for name in ("main", "master") if name in names), None)
        yield problem(
            "dvc",
            "HEAD is detached and an experiment is unfinished: dvc exp run was killed here",
            f"git switch {branch or (names[0] if len(names) == 1 else '<your branch>')}"
            "  # git status shows what it changed",
        )
    if refs:
        yield problem(
            "dvc",
            f"{EXEC_REFS}: {len(refs.splitlines())} refs of an unfinished experiment",
            f"git for-each-ref --format='delete %(refname)' {EXEC_REFS} | git update-ref --stdin",
        )


def _temporary_experiments(root: Path) -> Iterator[Finding]:
    """Look for checkouts of killed `dvc exp run --temp`."""
    for path in sorted((root / ".dvc/tmp/exps/standalone").glob("tmp*")):
        yield problem("dvc", f"{path}: checkout of a killed --temp experiment", f"rm -r {path}")


def _half_written(root: Path) -> Iterator[Finding]:
    """Look for folders and files that a killed stage was writing."""
    for path in sorted(
        [*root.glob("data/*.tmp"), *root.glob("data/*/*.tmp"), *root.glob("reports/*/*.tmp")]
    ):
        match = _TEMPORARY.search(path.name)
        if match and not psutil.pid_exists(int(match[1])):
            yield problem("dvc", f"{path}: half-written by a killed stage", f"rm -r {path}")
