import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.download import download
from tinyllm.artifact import load_manifest, verify_files
from tinyllm.corpus.documents import Document, read_documents
from tinyllm.errors import ParamsError, SourceError

READING = {"members": None, "encoding": "utf-8"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "b.txt").write_text("second")
    (texts / "a.txt").write_text("erste ü")
    (tmp_path / "rows.jsonl").write_text('{"text": "row one"}\n{"text": "row two"}\n')
    return tmp_path


def write(sources, max_documents=None):
    whole = {
        name: {"kind": "file", "sha256": None, "text_field": None, **READING, **source}
        for name, source in sources.items()
    }
    data = {"data": {"sources": whole, "max_documents": max_documents}}
    YAML(typ="safe", pure=True).dump(data, Path("params.yaml"))


SOURCES = {
    "texts": {"path": "texts/*.txt", "format": "txt"},
    "rows": {"path": "rows.jsonl", "format": "jsonl", "text_field": "text"},
}


def test_sources_become_documents_with_counts(here):
    write(SOURCES)
    download()
    assert list(read_documents(Path("data/raw/texts"))) == [
        Document("texts/a.txt", "erste ü"),
        Document("texts/b.txt", "second"),
    ]
    assert [each.name for each in read_documents(Path("data/raw/rows"))] == [
        "rows/rows.jsonl#0000000",
        "rows/rows.jsonl#0000001",
    ]
    metrics = json.loads(Path("reports/download/metrics.json").read_text())["download"]
    assert len(metrics["texts"].pop("digest")) == 64
    assert metrics["texts"] == {"bytes": 14, "documents": 2, "files": 2}
    assert metrics["rows"]["files"] == 1
    manifest = load_manifest(Path("data/raw"), "raw")
    verify_files(Path("data/raw"), manifest)
    assert manifest.info["sources"]["rows"]["documents"] == 2


def test_the_same_sources_give_the_same_digest_anywhere(here):
    write(SOURCES)
    digests = []
    for path in ("texts/*.txt", str(here / "texts/*.txt")):
        write({"texts": {"path": path, "format": "txt"}})
        download()
        digests.append(load_manifest(Path("data/raw")).info["sources"]["texts"]["digest"])
    assert digests[0] == digests[1]


def test_max_documents_takes_the_first_by_name(here):
    write(SOURCES, max_documents=1)
    download()
    assert [each.name for each in read_documents(Path("data/raw/texts"))] == ["texts/a.txt"]


def test_a_failing_source_leaves_the_older_artifact(here):
    write(SOURCES)
    download()
    before = load_manifest(Path("data/raw")).digest
    write({**SOURCES, "more": {"path": "nowhere/*.txt", "format": "txt"}})
    with pytest.raises(SourceError, match=r"nowhere/\*.txt: no such file"):
        download()
    assert load_manifest(Path("data/raw")).digest == before
    assert [path.name for path in Path("data").iterdir()] == ["raw"]


def test_a_source_without_documents_is_refused(here):
    (here / "empty.jsonl").write_text("\n")
    write({"empty": {"path": "empty.jsonl", "format": "jsonl", "text_field": "text"}})
    with pytest.raises(SourceError, match=r"empty.jsonl: holds no documents"):
        download()


def test_every_mistake_in_the_parameters_is_told(here):
    write({"one": {"path": "a", "format": "text"}, "two": {"path": "a", "encodin": "x"}})
    with pytest.raises(ParamsError) as info:
        download()
    told = str(info.value)
    assert "data.sources.one.format: 'text' is not one of txt" in told
    assert "data.sources.two.encodin: unknown parameter; did you mean encoding?" in told
    assert "data.sources.two.format: missing" in told
