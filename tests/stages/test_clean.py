import json
import random
import shutil
from pathlib import Path

import pytest

from stages.clean import clean
from tinyllm.artifact import build_artifact, load_manifest
from tinyllm.corpus.documents import Document, read_documents, write_documents
from tinyllm.errors import ArtifactError, DataError

ROOT = Path(__file__).parents[2]
WORDS = """the of and to in that is was he for it with as his on be at by had not are but from or
they which one you were all her she there would their we him been has when who will no more if out
night sword crown horse child wife fool ghost letter river castle candle morning winter garden door
speaks walks weeps laughs rides fears loves keeps finds loses sweet gentle bloody noble foolish"""


def play(seed):
    """English words in an order that differs by seed."""
    words = random.Random(seed).choices(WORDS.split(), k=800)
    return "\n".join(" ".join(words[i : i + 8]) for i in range(0, 800, 8))


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "params.yaml", "params.yaml")

    def build(names):
        with build_artifact(Path("data/raw"), kind="raw", made_from=[]) as draft:
            documents = [Document(f"plays/{name}", play(name)) for name in names]
            write_documents(draft.path / "plays", documents)
            draft.info["sources"] = {"plays": {"documents": len(documents)}}

    return build


def test_raw_becomes_train_and_validation(raw):
    raw(["hamlet", "lear", "macbeth"])
    clean()
    train, val = (list(read_documents(Path("data/clean") / split)) for split in ("train", "val"))
    assert [each.name for each in train] == ["plays/hamlet", "plays/lear"]
    assert [each.name for each in val] == ["plays/macbeth"]
    metrics = json.loads(Path("reports/clean/metrics.json").read_text())["clean"]
    assert metrics["bytes_train"] == sum(len(each.text.encode()) for each in train)
    manifest = load_manifest(Path("data/clean"), "clean")
    assert manifest.lineage == {"raw": load_manifest(Path("data/raw")).digest}
    assert set(manifest.files) == {f"{s}/documents-00000.jsonl" for s in ("train", "val")}


def test_nothing_half_written_if_the_corpus_is_empty(raw):
    raw(["hamlet", "lear"])
    with pytest.raises(DataError, match="validation set is empty"):
        clean()
    assert [path.name for path in Path("data").iterdir()] == ["raw"]
    assert not Path("reports").exists()


def test_a_changed_byte_in_the_raw_text_is_refused(raw):
    raw(["hamlet", "macbeth"])
    shard = Path("data/raw/plays/documents-00000.jsonl")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"documents-00000.jsonl: differs from its manifest"):
        clean()


def test_without_raw_text_the_message_says_how_to_get_it(raw):
    with pytest.raises(ArtifactError, match="data/raw: no manifest.json here; build it"):
        clean()
