"""The three stages between clean text and pre-training, in a folder of their own."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_text import made_up_text

from stages.encode import encode
from stages.prune_vocab import prune_vocab
from stages.train_tokenizer import train_tokenizer
from tinyllm import paths
from tinyllm.artifact import build_artifact, load_manifest, merge_lineage, verify_files
from tinyllm.corpus.documents import Document, write_documents
from tinyllm.errors import ArtifactError, DataError, LineageError, ParamsError
from tinyllm.shards.reader import TokenShards
from tinyllm.tokenizer.chat import ChatTemplate
from tinyllm.tokenizer.tokenizer import Tokenizer

PARAMS = """
tokenizer: {vocab_size: 450, min_count: 2, sample_bytes: 1000000}
prune: {vocab_size: 350, sample_bytes: 1000000}
encode: {shard_bytes: 6000}
"""
STAGES = (train_tokenizer, prune_vocab, encode)


def write_clean(n_val: int = 2, seed: int = 0) -> None:
    with build_artifact(paths.CLEAN, kind="clean", made_from=[]) as draft:
        for split, n in (("train", 9), ("val", n_val)):
            texts = [made_up_text(300, seed=seed + 100 * n + i) for i in range(n)]
            write_documents(
                draft.path / split, [Document(f"{split}/{i}", t) for i, t in enumerate(texts)]
            )
            (draft.path / split).mkdir(exist_ok=True)


def adopt(folder: Path, kind: str) -> None:
    """Make an artifact that of the present clean text, as if it had been trained on it."""
    manifest = load_manifest(folder)
    copies = {name: folder / name for name in manifest.files}
    with build_artifact(folder, kind=kind, made_from=[paths.CLEAN], copies=copies) as draft:
        draft.info.update(manifest.info)


def metrics_of(stage: str) -> dict:
    return json.loads((paths.REPORTS / stage / "metrics.json").read_text())[stage]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        paths.PARAMS.write_text(PARAMS)
        write_clean()
        for stage in STAGES:
            stage()
    return folder


@pytest.fixture
def workplace(built, tmp_path, monkeypatch) -> Path:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "data").rglob("*"))
        if path.is_file()
    }


def test_artifacts_are_whole_and_belong_together(workplace):
    artifacts = {
        paths.TOKENIZER_FULL: "tokenizer_full",
        paths.TOKENIZER: "tokenizer",
        paths.TOKENS: "tokens",
    }
    for folder, kind in artifacts.items():
        verify_files(folder, load_manifest(folder, kind))
    assert set(merge_lineage(list(artifacts))) == {"clean", *artifacts.values()}
    digest = load_manifest(paths.TOKENIZER).digest
    tokenizer = Tokenizer.load(paths.TOKENIZER)
    shards = TokenShards.open(paths.TOKENS, "val", digest)
    first = tokenizer.decode(next(shards.documents()).tolist())
    assert first == made_up_text(300, seed=200)
    assert ChatTemplate.load(paths.TOKENIZER).source == ChatTemplate().source


def test_metrics_say_what_happened(workplace):
    full, pruned, tokens = map(metrics_of, ("train_tokenizer", "prune_vocab", "encode"))
    assert full["vocab_size"] == pruned["vocab_size_before"] == 450
    assert pruned["vocab_size"] == 350
    assert pruned["embedding_rows_removed"] == 100
    assert pruned["unreachable_tokens"] == pruned["changed_words"] == 0
    assert pruned["round_trip_failures"] == 0
    assert full["bytes_per_token"] == pruned["bytes_per_token_before"]
    assert 1 < pruned["bytes_per_token"] <= pruned["bytes_per_token_before"]
    for split in ("train", "val"):
        shards = TokenShards.open(paths.TOKENS, split, None)
        assert tokens[split] == {
            "documents": len(list(shards.documents())),
            "shards": len(shards.stream.shards),
            "tokens": shards.n_tokens,
            "bytes_per_token": shards.n_bytes / shards.n_tokens,
        }
    assert tokens["train"]["shards"] > 1
    assert tokens["tokens_per_s"] > 0


def test_a_second_run_gives_the_same_bytes(workplace):
    before = files_of(workplace)
    for stage in STAGES:
        stage()
    assert files_of(workplace) == before


def test_null_keeps_the_whole_vocabulary(workplace):
    paths.PARAMS.write_text(PARAMS.replace("vocab_size: 350", "vocab_size: null"))
    prune_vocab()
    assert load_manifest(paths.TOKENIZER, "tokenizer")
    for name in ("tokenizer.json",):
        assert (paths.TOKENIZER / name).read_bytes() == (paths.TOKENIZER_FULL / name).read_bytes()
    assert metrics_of("prune_vocab")["embedding_rows_removed"] == 0
    encode()
    assert TokenShards.open(paths.TOKENS, "train", None).vocab_size == 450


@pytest.mark.parametrize(
    ("stage", "change"),
    [(train_tokenizer, ("vocab_size: 450", "vocab_size: 261")),
     (prune_vocab, ("vocab_size: 350", "vocab_size: 100"))],
)  # fmt: skip
def test_a_vocabulary_smaller_than_the_bytes_is_refused(workplace, stage, change):
    before = files_of(workplace)
    paths.PARAMS.write_text(PARAMS.replace(*change))
    with pytest.raises(
        ParamsError, match=r"(tokenizer|prune)\.vocab_size: .* has no room"
    ) as caught:
        stage()
    assert "\n" not in str(caught.value)
    assert files_of(workplace) == before


@pytest.mark.parametrize("stage", STAGES)
def test_an_empty_validation_split_is_refused(workplace, stage):
    write_clean(n_val=0)
    adopt(paths.TOKENIZER_FULL, "tokenizer_full")
    adopt(paths.TOKENIZER, "tokenizer")
    before = files_of(workplace)
    with pytest.raises(DataError, match="val: ") as caught:
        stage()
    assert "\n" not in str(caught.value)
    assert files_of(workplace) == before


def test_unrelated_inputs_are_refused(workplace):
    write_clean(seed=5)
    for stage in (prune_vocab, encode):
        with pytest.raises(LineageError, match="do not belong together"):
            stage()


@pytest.mark.parametrize(
    ("stage", "damaged"),
    [
        (train_tokenizer, "data/clean/train/documents-00000.jsonl"),
        (prune_vocab, "data/tokenizer/full/tokenizer.json"),
        (encode, "data/tokenizer/pruned/tokenizer.json"),
    ],
)
def test_damaged_inputs_are_refused_by_name(workplace, stage, damaged):
    path = workplace / damaged
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=damaged):
        stage()


@pytest.mark.parametrize("stage", STAGES)
def test_missing_inputs_are_refused(workplace, stage):
    shutil.rmtree(paths.CLEAN)
    with pytest.raises(ArtifactError, match=r"data/clean: no manifest\.json"):
        stage()
