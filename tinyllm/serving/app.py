"""The routes: completions, models, health, metrics and the chat page."""

import asyncio
import base64
import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tinyllm.inference.batching import Engine
from tinyllm.inference.session import Session
from tinyllm.serving import metrics as prometheus
from tinyllm.serving.calls import GONE, Calls, Limits
from tinyllm.serving.errors import ApiError
from tinyllm.serving.metrics import Metrics
from tinyllm.serving.schema import Wanted, parse_chat, parse_completion
from tinyllm.serving.worker import Worker

PAGE = Path(__file__).parent / "page.html"
LOOPBACK = ("127.0.0.1", "localhost")
Endpoint = Callable[[HttpRequest], Awaitable[Response]]
Parse = Callable[[bytes, int], Wanted]


def build_app(
    session: Session,
    engine: Engine,
    limits: Limits,
    *,
    name: str,
    system: str | None,
    api_key: str | None,
    is_local: bool,
    on_ready: Callable[[], None],
) -> Starlette:
    """Return the application, `state.worker` in it; its engine runs from startup to shutdown.

    Args:
        session: the model and its tokenizer.
        engine: made of the same model, not yet in use.
        limits: per call.
        name: the model's, for /v1/models and the field `model`.
        system: the system message of chats that bring none.
        api_key: what clients must show; None: nothing.
        is_local: answer only to local host names, so that no web page elsewhere can reach it
            under a name of its own (DNS rebinding).
        on_ready: called when requests are taken.
    """
    gauges = {
        "running": lambda: engine.scheduler.n_running,
        "waiting": lambda: engine.scheduler.n_waiting,
        "slots": lambda: engine.scheduler.n_slots,
    }
    books = Metrics(gauges)
    worker = Worker(engine, session.tokenizer, books)
    calls = Calls(session, worker, limits, name, system)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        """Run the engine's thread."""
        worker.start()
        on_ready()
        try:
            yield
        finally:
            await asyncio.to_thread(worker.stop)

    app = Starlette(
        routes=_routes(calls, session, worker, books, limits, name, api_key),
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)] if is_local else [],
        lifespan=lifespan,
    )
    app.state.worker = worker
    return app


def _routes(
    calls: Calls,
    session: Session,
    worker: Worker,
    books: Metrics,
    limits: Limits,
    name: str,
    api_key: str | None,
) -> list[Route]:
    """Return what is answered where; all but the page and the health need the key."""

    def completions(parse: Parse) -> Endpoint:
        """Return the endpoint of one kind of call."""

        async def endpoint(http: HttpRequest) -> Response:
            """Answer a call."""
            body = await read_body(http, limits)
            return await calls.answer(http, parse(body, limits.max_tokens))

        return endpoint

    async def models(_: HttpRequest) -> Response:
        """List the one model."""
        entry = {"id": name, "object": "model", "created": 0, "owned_by": "tinyllm"}
        context = session.model.config.max_seq_len
        return JSONResponse({"object": "list", "data": [{**entry, "context_tokens": context}]})

    async def health(_: HttpRequest) -> Response:
        """Tell whether the engine's thread is alive."""
        return JSONResponse(
            {"status": "ok" if worker.is_alive else "dead"}, 200 if worker.is_alive else 503
        )

    async def metrics(_: HttpRequest) -> Response:
        """Tell the counters and gauges in the format of Prometheus."""
        return PlainTextResponse(books.render(), media_type=prometheus.CONTENT_TYPE)

    guard = _guard(api_key, books)
    return [
        Route("/", _page(), methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", guard(metrics), methods=["GET"]),
        Route("/v1/models", guard(models), methods=["GET"]),
        Route("/v1/completions", guard(completions(parse_completion)), methods=["POST"]),
        Route("/v1/chat/completions", guard(completions(parse_chat)), methods=["POST"]),
    ]


def _guard(api_key: str | None, books: Metrics) -> Callable[[Endpoint], Endpoint]:
    """Return what wraps an endpoint: the key is checked, refusals become JSON, all is counted."""

    def wrap(endpoint: Endpoint) -> Endpoint:
        """Return the endpoint behind the guard."""

        async def guarded(http: HttpRequest) -> Response:
            """Answer a call, whatever becomes of it."""
            try:
                _check_key(http, api_key)
                response = await endpoint(http)
            except (ApiError, ClientDisconnect) as error:
                if isinstance(error, ClientDisconnect):
                    error = ApiError(GONE, "the client has left")
                response = JSONResponse(error.to_json(), error.status, error.headers)
            except Exception:
                books.count_response(http.url.path, 500)
                raise
            books.count_response(http.url.path, response.status_code)
            return response

        return guarded

    return wrap


def _check_key(http: HttpRequest, api_key: str | None) -> None:
    """Refuse a call without the key.

    Raises:
        ApiError: 401.
    """
    given = http.headers.get("authorization", "")
    if api_key and not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
        raise ApiError(401, "a key is needed: Authorization: Bearer <key>", code="invalid_api_key")


async def read_body(http: HttpRequest, limits: Limits) -> bytes:
    """Return the body of a call.

    Raises:
        ApiError: it is not declared as JSON, which a form of a foreign web page cannot do; is
            larger than the limit; or does not come in time.
    """
    if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(400, "Content-Type: must be application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.max_seconds):
            async for part in http.stream():
                body += part
                if len(body) > limits.max_body_bytes:
                    raise ApiError(413, f"the body is larger than {limits.max_body_bytes} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {limits.max_seconds:g} s") from None
    return bytes(body)


def _page() -> Endpoint:
    """Return the endpoint of the chat page; nothing but its own script and style may run there."""
    html = PAGE.read_text(encoding="utf-8")
    policy = [
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
        "; frame-ancestors 'none'"
    ]
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy.append(f"{tag}-src 'sha256-{digest}'")
    headers = {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    async def page(_: HttpRequest) -> Response:
        """Answer with the page."""
        return HTMLResponse(html, headers=headers)

    return page
