"""params.yaml as typed values: what a stage declares is read and checked; nothing else is.

A stage declares a dataclass whose fields are the sections it reads; each section is a scalar or a
dataclass of the package that uses it. Every problem of every section is reported at once, by
dotted path. There are no defaults here: a missing key is as much a mistake as an unknown one.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tinyllm.errors import ParamsError

T = TypeVar("T")


def load_params(kind: type[T], path: Path) -> T:
    """Read the sections that `kind` declares from a YAML file.

    Args:
        kind: a dataclass; its field names are section names, its field types say what each section
        holds.
        path: a YAML 1.2 file (so that `3e-4` is a number).

    Raises:
        ParamsError: the file cannot be read, or keys are unknown, missing, ill-typed or refused by
        their dataclass.
    """
    document = read_yaml(path)
    sections = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return build_params(
        kind, {name: document[name] for name in sections if name in document}, str(path)
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML 1.2 file.

    Raises:
        ParamsError: the file is missing, is not YAML or is not a mapping.
    """
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run from the folder that holds it") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ParamsError(f"{path}: must be a mapping of sections")
    return document


def build_params(kind: type[T], values: Mapping[str, Any], source: str) -> T:
    """Build `kind` from plain values.

    Args:
        kind: a dataclass.
        values: what YAML or JSON gave.
        source: the name of where the values come from, for messages.

    Raises:
        ParamsError: one line per problem, each with its dotted path.
    """
    problems: list[str] = []
    result = _convert(values, kind, "", problems)
    if problems:
        raise ParamsError("\n".join(f"{source}: {problem}" for problem in problems))
    return typing.cast(T, result)


def to_plain(value: Any) -> Any:
    """Return dataclasses and tuples as the dicts and lists that JSON knows, recursively."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def _convert(value: Any, kind: Any, path: str, problems: list[str]) -> Any:
    """Return `value` as `kind`, or note why not in `problems` and return None."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(value, arguments, path, problems)
    if origin is typing.Literal:
        if value not in arguments or type(value) not in {type(choice) for choice in arguments}:
            choices = ", ".join(map(str, arguments))
            problems.append(
                f"{path}: {value!r} is not one of {choices}{_hint(str(value), map(str, arguments))}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list):
            problems.append(f"{path}: expected a list, got {_show(value)}")
            return None
        return tuple(
            _convert(item, arguments[0], f"{path}[{i}]", problems) for i, item in enumerate(value)
        )
    if origin is dict:
        if not isinstance(value, dict):
            problems.append(f"{path}: expected a mapping, got {_show(value)}")
            return None
        return {
            str(key): _convert(item, arguments[1], f"{path}.{key}", problems)
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(value, typing.cast(type, kind), path, problems)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # exact: True is an int for isinstance
        problems.append(f"{path}: expected {kind.__name__}, got {_show(value)}")
        return None
    return value


def _convert_union(
    value: Any, alternatives: tuple[Any, ...], path: str, problems: list[str]
) -> Any:
    """Convert to null, the one type beside it, or the dataclass whose `kind` is named."""
    if value is None and types.NoneType in alternatives:
        return None
    kinds = [kind for kind in alternatives if kind is not types.NoneType]
    if len(kinds) == 1:
        return _convert(value, kinds[0], path, problems)
    by_name = {
        name: kind
        for kind in kinds
        for name in typing.get_args(typing.get_type_hints(kind)["kind"])
    }
    named = value.get("kind") if isinstance(value, Mapping) else None
    if named not in by_name:
        problems.append(
            f"{path}.kind: {named!r} is not one of {', '.join(by_name)}{_hint(str(named), by_name)}"
        )
        return None
    return _convert(value, by_name[named], path, problems)


def _convert_dataclass(value: Any, kind: type, path: str, problems: list[str]) -> Any:
    """Convert a mapping field by field, then let the dataclass itself refuse combinations."""
    if not isinstance(value, Mapping):
        problems.append(f"{path}: expected a mapping, got {_show(value)}")
        return None
    fields = typing.get_type_hints(kind)
    prefix = f"{path}." if path else ""
    before = len(problems)
    problems += [
        f"{prefix}{key}: unknown parameter{_hint(str(key), fields)}"
        for key in value
        if str(key) not in fields
    ]
    problems += [
        f"{prefix}{name}: missing; add it to the file" for name in fields if name not in value
    ]
    found = {name: value[name] for name in fields if name in value}
    converted = {
        name: _convert(item, fields[name], f"{prefix}{name}", problems)
        for name, item in found.items()
    }
    if len(problems) > before:
        return None
    try:
        return kind(**converted)
    except ValueError as error:
        problems += [f"{prefix}{line}" for line in str(error).splitlines()]
        return None


def _hint(word: str, known: Iterable[str]) -> str:
    """Return a "did you mean" for a mistyped word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _show(value: Any) -> str:
    """Return a value with its type, as a message shows it."""
    return "null" if value is None else f"{type(value).__name__} {value!r}"
