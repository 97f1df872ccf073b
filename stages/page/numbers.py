"""Numbers as people read them; the unit at the end of a metric's name decides the form."""

from collections.abc import Iterator, Mapping
from typing import Any

NOTHING = "–"
_SCALES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def show(name: str, value: Any) -> str:
    """Return the value of a metric as text.

    >>> show("file_bytes", 20_728_071), show("val_bpb", 1.98765), show("tokens", 1551609)
    ('20.7 MB', '1.988', '1,551,609')
    >>> show("tied_share", 0.0123), show("seconds", 75.2), show("steps", None)
    ('1.23 %', '75.2 s', '–')
    """
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name.endswith("bytes"):
        return scaled(value, "B")
    if name.endswith(("_share", "mfu", "agreement")):
        return f"{100 * value:.3g} %"
    if "_bpb" in name:
        return f"{value:.3f}"
    for suffix, unit in {"_per_s": "/s", "_ms": " ms", "_db": " dB", "seconds": " s"}.items():
        if name.endswith(suffix):
            return plain(value) + unit
    return plain(value)


def plain(value: float) -> str:
    """Return a number with about four digits, whole numbers in full."""
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.2e}" if value != 0 and abs(value) < 1e-3 else f"{value:.4g}"


def scaled(value: float, unit: str) -> str:
    """Return a number with three digits and a decimal prefix."""
    for scale, prefix in _SCALES:
        if abs(value) >= scale:
            digits = f"{value / scale:#.3g}".removesuffix(".")
            return f"{digits} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings under dotted names; a list is one leaf.

    >>> list(flatten({"a": {"b": 1}, "c": [1, 2]}))
    [('a.b', 1), ('c', '1, 2')]
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{name}", value
