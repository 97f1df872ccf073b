"""Presets: partial copies of params.yaml that are merged into it.

A preset is no second place for defaults: it is applied, and params.yaml is what counts. A mapping
whose names are the user's own (`data.sources`) is replaced as a whole; all else is merged by key.
"""

import dataclasses
import difflib
import importlib
import io
import pkgutil
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

import stages
from tinyllm.artifact import write_text
from tinyllm.errors import ParamsError
from tinyllm.params import build_params, read_yaml

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_HYDRA_WORDS = ("null", "true", "false", "nan", "inf")

Leaf = tuple[tuple[str, ...], Any]
"""A dotted path as its parts, and the value there."""


class _Representer(RoundTripRepresenter):
    """Writes null as `null`, not as nothing."""


_Representer.add_representer(
    type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null")
)


def apply_preset(name: str, presets: Path, params: Path) -> list[str]:
    """Merge a preset into a params file; comments and order of the file stay.

    Args:
        name: file name in `presets` without `.yaml`.
        presets: the folder of presets.
        params: the file to change.

    Returns:
        What has changed, one line per value.

    Raises:
        ParamsError: there is no such preset, it has unknown keys, or the result is not valid.
    """
    overlay, before = _read(name, presets), read_yaml(params)
    merge(before, overlay, str(presets / f"{name}.yaml"))
    yaml = YAML()
    yaml.preserve_quotes, yaml.width, yaml.Representer = True, 4096, _Representer
    document = yaml.load(params.read_text(encoding="utf-8"))
    styled = yaml.load((presets / f"{name}.yaml").read_text(encoding="utf-8"))
    changed = []
    for path, value in _leaves(overlay):
        parent, wanted = document, styled
        for part in path[:-1]:
            parent, wanted = parent[part], wanted[part]
        old = _at(before, path)
        if old != value:
            parent[path[-1]] = wanted[path[-1]]
            changed.append(f"{'.'.join(path)}: {_short(old)} -> {_short(value)}")
    text = io.StringIO()
    yaml.dump(document, text)
    if changed:
        write_text(params, text.getvalue())
    return changed or [f"{params}: already as {name} wants it"]


def preset_arguments(name: str, presets: Path, params: Path) -> list[str]:
    """Return a preset as words for `dvc exp run $(tinyllm preset NAME --args)`.

    The shell splits an unquoted `$(...)` at spaces and takes quotes as they are, so no word may
    have a space in it.

    Raises:
        ParamsError: as `apply_preset`, or a value cannot be said in one word.
    """
    overlay, before = _read(name, presets), read_yaml(params)
    merge(before, overlay, str(presets / f"{name}.yaml"))
    words = []
    for path, value in _leaves(overlay):
        key = ".".join(path)
        if isinstance(value, Mapping):  # Hydra would merge it; what it replaces goes first
            old = _at(before, path)
            words += [f"~{key}.{part}" for part in old]
            words += [f"+{key}.{part}={_hydra(item)}" for part, item in value.items()]
        else:
            words.append(f"{key}={_hydra(value)}")
    for word in words:
        if any(character.isspace() for character in word):
            raise ParamsError(
                f"{presets / name}.yaml: {word.partition('=')[0].lstrip('+')} has a space in it,"
                f" which --args cannot say; run `tinyllm preset {name}`, then `dvc exp run`"
            )
    return [part for word in words for part in ("-S", word)]


def check_params(path: Path) -> int:
    """Check every section of a params file as the stages would; return how many there are.

    Raises:
        ParamsError: one line per problem.
    """
    _build(read_yaml(path), str(path))
    return len(sections())


def merge(document: Mapping[str, Any], overlay: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a document with an overlay's values, checked.

    Args:
        document: what params.yaml holds.
        overlay: a partial copy.
        source: the overlay's name, for messages.

    Raises:
        ParamsError: unknown keys, or a result that is not valid; one line per problem.
    """
    merged = _merged(document, overlay, ())
    _build(merged, source)
    return merged


def sections() -> dict[str, Any]:
    """Return the type of every section of params.yaml, as the stages declare them."""
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(stages.__path__):
        declared = getattr(importlib.import_module(f"stages.{module.name}"), "Params", None)
        if declared is not None:
            found |= typing.get_type_hints(declared)
    return found


def _read(name: str, presets: Path) -> dict[str, Any]:
    """Read a preset."""
    path = presets / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in presets.glob("*.yaml"))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ParamsError(f"{path}: no such preset{hint}; there are {', '.join(known) or 'none'}")
    return read_yaml(path)


def _build(document: Mapping[str, Any], source: str) -> None:
    """Build all sections from plain values, or raise what is wrong with them."""
    everything = dataclasses.make_dataclass("Everything", list(sections().items()))
    build_params(everything, document, source)


def _merged(
    document: Mapping[str, Any], overlay: Mapping[str, Any], path: tuple[str, ...]
) -> dict[str, Any]:
    """Return the document with the overlay's values, key by key."""
    result = dict(document)
    for key, value in overlay.items():
        here, old = (*path, key), result.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and not _is_named_by_user(here):
            result[key] = _merged(old, value, here)
        else:
            result[key] = value
    return result


def _leaves(overlay: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Yield what an overlay sets, in order; a mapping that replaces another one is one value."""
    for key, value in overlay.items():
        here = (*path, str(key))
        if isinstance(value, Mapping) and not _is_named_by_user(here):
            yield from _leaves(value, here)
        else:
            yield here, value


def _is_named_by_user(path: tuple[str, ...]) -> bool:
    """Return whether the keys of a mapping are names that users choose, not fields."""
    kind: Any = sections().get(path[0])
    for part in path[1:]:
        if not dataclasses.is_dataclass(kind):
            return False
        kind = typing.get_type_hints(kind).get(part)
    return typing.get_origin(kind) is dict


def _at(document: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Return the value at a path."""
    value: Any = document
    for part in path:
        value = value[part]
    return value


def _hydra(value: Any) -> str:
    """Return a value in the grammar of Hydra's overrides, which `dvc exp run -S` reads."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        is_plain = _PLAIN.fullmatch(value) and value.lower() not in _HYDRA_WORDS
        return value if is_plain else "'" + value.replace("'", "\\'") + "'"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_hydra, value)) + "]"
    return repr(value)


def _short(value: Any) -> str:
    """Return a value for a message."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(map(str, value)) + "}"
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
