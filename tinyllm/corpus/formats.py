"""Readers: the bytes of one file become documents, in the way that `format` names.

The readers here are general; corpora with a form of their own are in `corpora.py`.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from tinyllm.corpus.corpora import read_chitchat, read_parables, read_tagged_words
from tinyllm.corpus.documents import Document
from tinyllm.corpus.sources import Reading
from tinyllm.errors import DataError

_PARQUET_ROWS = 1000


def read_format(reading: Reading, name: str, stream: BinaryIO) -> Iterator[Document]:
    """Yield the documents of one file; rows of a table are numbered behind `#`.

    Args:
        reading: the format, the encoding of text, the field that holds the text.
        name: of the file.
        stream: its content.

    Raises:
        DataError: the content is not of the format; the file and the place are named.
    """
    try:
        if reading.format in _WHOLE_FILE:
            text = _decode(stream.read(), reading.encoding, name)
            yield Document(name, _WHOLE_FILE[reading.format](text))
            return
        for row, text in _ROWS[reading.format](reading, name, stream):
            yield Document(f"{name}#{row:07d}", text)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise DataError(
            f"{name}: does not have the form that format {reading.format} reads"
        ) from None


def pick_field(row: Any, field: str | None, where: str) -> str:
    """Return the text in a row: the value at the dotted path `field`.

    >>> pick_field({"input": [{"content": "hi"}]}, "input.0.content", "x")
    'hi'

    Raises:
        DataError: no such field, or no text in it.
    """
    value = row
    for key in field.split(".") if field else ():
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError):
            known = f"; it has {', '.join(map(str, row))}" if isinstance(row, Mapping) else ""
            raise DataError(f"{where}: no field {field!r}{known}; correct text_field") from None
    if not isinstance(value, str):
        hint = "set text_field" if field is None else "correct text_field"
        raise DataError(
            f"{where}: {field or 'the row'} is no text but {type(value).__name__}; {hint}"
        )
    return value


def _read_jsonl(reading: Reading, name: str, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield the text of each line that is not blank."""
    for row, line in enumerate(stream):
        if line.strip():
            where = f"{name}:{row + 1}"
            yield row, pick_field(_parse_json(line, where), reading.text_field, where)


def _read_json(reading: Reading, name: str, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield the text of each row of a JSON list, or of the one value."""
    yield from _read_rows(reading, name, _parse_json(stream.read(), name))


def _read_yaml(reading: Reading, name: str, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield the text of each row of a YAML list, or of the one value."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        value = YAML(typ="safe", pure=True).load(_decode(stream.read(), reading.encoding, name))
    except YAMLError as error:
        raise DataError(f"{name}: not readable as YAML: {' '.join(str(error).split())}") from None
    yield from _read_rows(reading, name, value)


def _read_rows(reading: Reading, name: str, value: Any) -> Iterator[tuple[int, str]]:
    """Yield the text of each row of a list, or of a single row."""
    for row, item in enumerate(value if isinstance(value, list) else [value]):
        yield row, pick_field(item, reading.text_field, f"{name}#{row}")


def _read_parquet(reading: Reading, name: str, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield the text of each row, a batch of rows in memory at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    column = reading.text_field
    try:
        file = parquet.ParquetFile(stream)
        if column is None or column not in file.schema_arrow.names:
            known = ", ".join(file.schema_arrow.names)
            raise DataError(f"{name}: no column {column!r}; it has {known}; correct text_field")
        row = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                if value is not None:
                    yield row, pick_field(value, None, f"{name}#{row}")
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}: not readable as parquet: {str(error).splitlines()[0]}") from None


def _read_parables(reading: Reading, name: str, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield the fable of each line."""
    for row, line in enumerate(stream):
        yield row, read_parables(_parse_json(line, f"{name}:{row + 1}"))


def _read_chitchat(reading: Reading, name: str, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield the text of each dialogue."""
    yield from enumerate(read_chitchat(_parse_json(stream.read(), name)))


def _parse_json(content: bytes, where: str) -> Any:
    """Return a JSON value."""
    try:
        return json.loads(content)
    except ValueError as error:
        raise DataError(f"{where}: not readable as JSON: {error}") from None


def _decode(content: bytes, encoding: str, name: str) -> str:
    """Return the text, without a byte-order mark and with newlines as line ends."""
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: byte {error.start} is not {encoding}; correct the source's encoding"
        ) from None
    return io.IncrementalNewlineDecoder(None, translate=True).decode(text.removeprefix("\ufeff"))


_WHOLE_FILE: dict[str, Callable[[str], str]] = {"txt": str, "tagged_words": read_tagged_words}
_ROWS: dict[str, Callable[[Reading, str, BinaryIO], Iterator[tuple[int, str]]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "yaml": _read_yaml,
    "parquet": _read_parquet,
    "parables": _read_parables,
    "chitchat": _read_chitchat,
}
