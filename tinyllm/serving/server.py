"""A model directory opened, with an engine, behind a socket."""

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from tinyllm.errors import TinyllmError
from tinyllm.inference.batching import Engine
from tinyllm.inference.conversation import stop_ids
from tinyllm.inference.prefix import Prefix, open_prefix, system_prefix
from tinyllm.inference.session import Session
from tinyllm.ops.build import cache_directory
from tinyllm.serving.app import LOOPBACK, build_app
from tinyllm.serving.calls import Limits
from tinyllm.serving.worker import Worker

CUT_OFF_S = 5
"""How long clients get to read the end of an answer that was cut off."""


class ServeError(TinyllmError):
    """A server that cannot start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """What `tinyllm serve` is told."""

    host: str
    port: int
    """0: any free one."""
    n_slots: int
    """Answers made at once; each sets a whole context of cache aside."""
    max_waiting: int
    """Requests that may wait; more are answered 429."""
    chunk_tokens: int
    """Prompt tokens read per step."""
    limits: Limits
    grace_seconds: int
    """At shutdown: how long running answers may take to finish before they are cut off."""
    system: str | None
    """System message of chats that bring none; its keys and values are kept on the disk."""
    api_key: str | None
    """What clients must show."""

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        least = {
            "slots": (self.n_slots, 1),
            "queue": (self.max_waiting, 0),
            "chunk_tokens": (self.chunk_tokens, 1),
            "max_tokens": (self.limits.max_tokens, 1),
            "max_body_bytes": (self.limits.max_body_bytes, 1),
            "max_seconds": (self.limits.max_seconds, 0.001),
            "grace_seconds": (self.grace_seconds, 0),
        }
        problems = [
            f"{name}: must be at least {limit:g}, got {value:g}"
            for name, (value, limit) in least.items()
            if value < limit
        ]
        if problems:
            raise ValueError("\n".join(problems))


def serve(session: Session, settings: ServerSettings, tell: Callable[[str], None]) -> None:
    """Serve a model until SIGINT or SIGTERM; running answers are finished or cut off.

    Args:
        session: the model.
        settings: how.
        tell: gets a line when there is something to say to who started it.

    Raises:
        ServeError: the address is taken or not this machine's.
    """
    prefixes = []
    if settings.system:
        prefix, how = open_system_prefix(session, settings.system)
        tell(f"system message: {len(prefix.ids)} tokens {how}")
        prefixes.append(prefix)
    engine = Engine(
        session.model,
        stop_ids(session.tokenizer),
        n_slots=settings.n_slots,
        chunk_tokens=settings.chunk_tokens,
        max_waiting=settings.max_waiting,
        prefixes=prefixes,
    )
    listener = listen(settings.host, settings.port)
    address = f"http://{settings.host}:{listener.getsockname()[1]}"
    app = build_app(
        session,
        engine,
        settings.limits,
        name=model_name(session.directory),
        system=settings.system,
        api_key=settings.api_key,
        is_local=settings.host in LOOPBACK,
        on_ready=lambda: tell(f"{session.description}: serving at {address} (Ctrl-C ends)"),
    )
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=settings.grace_seconds + CUT_OFF_S,
        server_header=False,
    )
    with listener:
        _Server(config, settings.grace_seconds, app.state.worker).run(sockets=[listener])


class _Server(uvicorn.Server):
    """A server that at its end lets answers finish for a while and then ends them in good order."""

    def __init__(self, config: uvicorn.Config, grace_seconds: int, worker: Worker) -> None:
        super().__init__(config)
        self._grace_seconds, self._worker = grace_seconds, worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new connections, wait for the answers, end what is left."""
        asyncio.get_running_loop().call_later(self._grace_seconds, self._worker.cut_off)
        await super().shutdown(sockets)


def open_system_prefix(session: Session, system: str) -> tuple[Prefix, str]:
    """Return the shared start of all chats under a system message, and how it was got."""
    ids = system_prefix(system, session.template, session.tokenizer)
    return open_prefix(cache_directory() / "prefix", session.directory, session.model, ids)


def model_name(directory: Path) -> str:
    """Return a model's name: its folder's, or its parent's for a `merged` one."""
    path = directory.resolve()
    return path.parent.name if path.name == "merged" else path.name


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ServeError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ServeError(f"{host}:{port}: {reason}; choose another --host or --port") from None
