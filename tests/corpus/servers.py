"""A small file server on 127.0.0.1 that misbehaves on request."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """Files by path, the faults to commit, and what was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.statuses: list[int] = []  # answered first, one per GET
        self.cuts: list[int] = []  # bytes after which the next GETs break off
        self.ranges = True
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.url = ""


@contextmanager
def serve() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            wanted = self.headers.get("Range")
            site.asked.append((self.command, self.path, wanted))
            if body and site.statuses:
                self.fail(site.statuses.pop(0))
                return
            content = site.files.get(self.path.partition("?")[0])
            if content is None:
                self.fail(404)
                return
            start = int(wanted[6:].split("-")[0]) if wanted and site.ranges else 0
            if start and start >= len(content):
                self.fail(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            if start:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            self.send_header("X-Repo-Commit", "f" * 40)
            self.end_headers()
            if body and site.cuts:
                self.wfile.write(content[start : start + site.cuts.pop(0)])
                self.close_connection = True
            elif body:
                self.wfile.write(content[start:])

        def fail(self, status):
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client that hangs up is no news
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
