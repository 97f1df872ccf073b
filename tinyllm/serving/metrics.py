"""Counters, gauges and histograms in Prometheus' text form, without a library.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

FIRST_TOKEN_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
BETWEEN_TOKENS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(slots=True)
class Histogram:
    """How many values were at most so large."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    """Per bound, then those above all."""
    total: float = 0.0

    def __post_init__(self) -> None:
        """Begin empty."""
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        above = sum(value > bound for bound in self.bounds)
        self.counts[above] += 1
        self.total += value

    def lines(self, name: str) -> Iterator[str]:
        """Yield the samples, cumulative as Prometheus wants them."""
        n = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            n += count
            yield f'{name}_bucket{{le="{bound}"}} {n}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {n}"


class Metrics:
    """What a server has done so far; the worker's thread and the event loop both write."""

    def __init__(self, gauges: Mapping[str, Callable[[], float]]) -> None:
        """Take the gauges, which are asked when someone looks."""
        self._gauges, self._lock = gauges, threading.Lock()
        self._responses: Counter[tuple[str, int]] = Counter()
        self._counters: Counter[str] = Counter(
            dict.fromkeys(("prompt_tokens", "shared_tokens", "answer_tokens", "cancelled"), 0)
        )
        self._first, self._between = Histogram(FIRST_TOKEN_S), Histogram(BETWEEN_TOKENS_S)

    def count(self, name: str, n: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[name] += n

    def count_response(self, path: str, status: int) -> None:
        """Count a response."""
        with self._lock:
            self._responses[path, status] += 1

    def time_token(self, seconds: float, *, is_first: bool) -> None:
        """Note how long a token took: since its request came, or since the one before it."""
        with self._lock:
            (self._first if is_first else self._between).add(seconds)

    def render(self) -> str:
        """Return everything as text."""
        with self._lock:
            lines = ["# TYPE tinyllm_responses_total counter"]
            lines += [
                f'tinyllm_responses_total{{path="{path}",status="{status}"}} {n}'
                for (path, status), n in sorted(self._responses.items())
            ]
            for name, n in sorted(self._counters.items()):
                lines += [f"# TYPE tinyllm_{name}_total counter", f"tinyllm_{name}_total {n}"]
            for name, value in self._gauges.items():
                lines += [f"# TYPE tinyllm_{name} gauge", f"tinyllm_{name} {value():g}"]
            for name, histogram in (
                ("tinyllm_first_token_seconds", self._first),
                ("tinyllm_between_tokens_seconds", self._between),
            ):
                lines += [f"# TYPE {name} histogram", *histogram.lines(name)]
        return "\n".join(lines) + "\n"
