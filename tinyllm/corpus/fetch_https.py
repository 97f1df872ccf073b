"""Fetch a file over HTTP(S) through cuts: what has arrived stays in `<name>.part`."""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tinyllm.artifact import file_sha256
from tinyllm.corpus.sources import HttpsSource
from tinyllm.errors import SourceError
from tinyllm.progress import Progress

ATTEMPTS = 6
"""Tries without a single new byte before giving up."""
_TIMEOUT_S = 60
_CHUNK_BYTES = 1 << 18
_RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)


def fetch_https(
    source: HttpsSource,
    directory: Path,
    progress: Progress,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Return the downloaded file once its SHA-256 is right.

    Args:
        source: the URL and the hash.
        directory: gets the file, or its `.part`.
        progress: told the bytes.
        sleep: waits between tries; 1, 2, 4, ... seconds.

    Raises:
        SourceError: the server refuses, cannot be reached, or sends something else.
    """
    path = directory / unquote(Path(urlsplit(source.url).path).name)
    if path.is_file() and file_sha256(path) == source.sha256:
        return path
    part = path.with_name(path.name + ".part")
    continued = part.is_file()
    _download(source.url, part, progress, sleep)
    if file_sha256(part) != source.sha256 and continued:
        part.unlink()  # the older half may be of another file: once more, from the start
        _download(source.url, part, progress, sleep)
    found = file_sha256(part)
    if found != source.sha256:
        part.unlink()
        raise SourceError(
            f"{source.url}: SHA-256 is {found}, promised was {source.sha256};"
            " correct it if you trust the file"
        )
    return part.replace(path)


def _download(url: str, part: Path, progress: Progress, sleep: Callable[[float], None]) -> None:
    """Bring the whole file into `part`, trying again after cuts."""
    failures = 0
    while True:
        before = _size(part)
        try:
            if _continue(url, part, progress):
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and before:  # nothing left to send, or another file: start over
                part.unlink()
                reason = "the server has a shorter file"
            elif error.code in _RETRY_STATUS:
                reason = f"HTTP {error.code} {error.reason}"
            else:
                raise SourceError(
                    f"{url}: HTTP {error.code} {error.reason}; check the address"
                ) from None
        except _NetworkError as error:
            reason = str(error)
        failures = 0 if _size(part) > before else failures + 1
        if failures >= ATTEMPTS:
            raise SourceError(
                f"{url}: {reason}; tried {ATTEMPTS} times, check the network and run again"
            )
        sleep(float(2 ** max(0, failures - 1)))


class _NetworkError(Exception):
    """A failure of the network, told apart from one of the disk: both are OSError in Python."""


def _continue(url: str, part: Path, progress: Progress) -> bool:
    """Ask for what `part` lacks and append it; return whether the file is now whole."""
    have = _size(part)
    headers = {"User-Agent": "tinyllm", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S
        )
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _NetworkError(_reason(error)) from None
    with response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        length = response.headers.get("Content-Length")
        total = int(length) + (have if resumed else 0) if length else None
        with part.open("ab" if resumed else "wb") as file:
            done = have if resumed else 0
            while chunk := _read(response):
                file.write(chunk)
                done += len(chunk)
                if total:
                    progress.step(part.stem, done, max(total, done))
    return total is None or done == total


def _read(response: http.client.HTTPResponse) -> bytes:
    """Return the next bytes, empty at the end."""
    try:
        return response.read(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _NetworkError(_reason(error)) from None


def _reason(error: BaseException) -> str:
    """Return the cause of a network failure in a few words."""
    inner = getattr(error, "reason", error)
    return str(getattr(inner, "strerror", None) or inner or type(error).__name__)


def _size(path: Path) -> int:
    """Return the length of a file in bytes, 0 if it is absent."""
    return path.stat().st_size if path.is_file() else 0
