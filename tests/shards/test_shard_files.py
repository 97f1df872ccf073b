import shutil

import numpy as np
import pyarrow as pa
import pytest
from tiny_text import made_up_text, tiny_tokenizer

from tinyllm.artifact import build_artifact, load_manifest, verify_files
from tinyllm.errors import ArtifactError, DataError, LineageError
from tinyllm.progress import Silent
from tinyllm.shards.reader import TokenShards, file_xxh3
from tinyllm.shards.writer import EncodeParams, write_tokens

DIGEST, OTHER_DIGEST = "a" * 64, "b" * 64
DOCUMENTS = {
    "train": [(f"train/{i}", made_up_text(40 * i, seed=i)) for i in range(12)],
    "val": [("val/é", "Ünïcödé <|endoftext|> 😀\n"), ("val/empty", "")],
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def build_tokens(directory, tokenizer, *, digest=DIGEST, shard_bytes=2000, documents=DOCUMENTS):
    params = EncodeParams(shard_bytes=shard_bytes)
    with build_artifact(directory, kind="tokens", made_from=[], config=params) as draft:
        draft.info.update(write_tokens(documents, draft.path, tokenizer, digest, params, Silent()))
    return directory


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    return build_tokens(tmp_path_factory.mktemp("shards") / "tokens", tokenizer)


@pytest.fixture
def tokens(written, tmp_path):
    return shutil.copytree(written, tmp_path / "tokens")


def test_what_is_written_is_read(tokenizer, written):
    for split, rows in DOCUMENTS.items():
        shards = TokenShards.open(written, split, DIGEST)
        found = list(shards.documents())
        assert [tokenizer.decode(tokens.tolist()) for tokens in found] == [text for _, text in rows]
        assert all(tokens[-1] == 0 and tokens[:-1].min(initial=9) > 5 for tokens in found)
        assert shards.n_bytes == sum(len(text.encode()) for _, text in rows)
        assert shards.n_tokens == len(shards.stream) == sum(map(len, found))
        assert shards.stream.read(0, shards.n_tokens).tolist() == np.concatenate(found).tolist()
        assert shards.vocab_size == 500


def test_shards_are_closed_beyond_their_size(written):
    entries = load_manifest(written).info["splits"]["train"]["shards"]
    assert len(entries) > 2
    sizes = [len(tokens) * 2 for tokens in TokenShards.open(written, "train", None).stream.shards]
    assert min(sizes[:-1]) >= 2000
    longest = 2 * max(
        len(tokens) for tokens in TokenShards.open(written, "train", None).documents()
    )
    assert max(sizes) < 2000 + longest


def test_any_arrow_reader_reads_a_shard(written):
    with pa.ipc.open_file(str(written / "val" / "shard-00000.arrow")) as file:
        table = file.read_all()
    assert table.schema.names == ["name", "tokens", "n_bytes"]
    assert table.schema.field("tokens").type == pa.list_(pa.uint16())
    assert table.column("name").to_pylist() == ["val/é", "val/empty"]
    assert table.column("tokens").to_pylist()[1] == [0]
    table.validate(full=True)


def test_tokens_are_views_of_the_mapped_file(written):
    before = pa.total_allocated_bytes()
    shards = TokenShards.open(written, "train", DIGEST)
    assert pa.total_allocated_bytes() == before
    assert all(not tokens.flags.owndata for tokens in shards.stream.shards)
    assert all(not tokens.flags.writeable for tokens in shards.stream.shards)


def test_same_documents_same_bytes(tokenizer, written, tmp_path):
    again = build_tokens(tmp_path / "again", tokenizer)
    assert load_manifest(again) == load_manifest(written)
    verify_files(again, load_manifest(again))


def test_manifest_counts_what_is_there(written):
    manifest = load_manifest(written)
    for entry in manifest.info["splits"].values():
        for name in ("n_documents", "n_tokens", "n_bytes"):
            assert entry[name] == sum(shard[name] for shard in entry["shards"])
        for shard in entry["shards"]:
            path = written / shard["file"]
            assert shard["xxh3_128"] == file_xxh3(path)
            assert shard["size_bytes"] == path.stat().st_size
            assert shard["file"] in manifest.files


@pytest.mark.parametrize("where", [0, 0.3, 0.5, 0.9, -1])
def test_a_flipped_bit_is_refused_by_name(tokens, where):
    path = tokens / "train" / "shard-00001.arrow"
    content = bytearray(path.read_bytes())
    content[int(where * len(content)) if where >= 0 else -1] ^= 16
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"train/shard-00001\.arrow: ") as caught:
        TokenShards.open(tokens, "train", DIGEST)
    assert "\n" not in str(caught.value)
    TokenShards.open(tokens, "val", DIGEST)


@pytest.mark.parametrize("size", [0, 7, 500, -1])
def test_a_truncated_shard_is_refused_by_name(tokens, size):
    path = tokens / "train" / "shard-00001.arrow"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtifactError, match=r"train/shard-00001\.arrow: \d+ bytes, not \d+"):
        TokenShards.open(tokens, "train", DIGEST)


def test_a_missing_shard_is_refused_by_name(tokens):
    (tokens / "train" / "shard-00000.arrow").unlink()
    with pytest.raises(ArtifactError, match=r"shard-00000\.arrow: missing"):
        TokenShards.open(tokens, "train", DIGEST)


def test_another_tokenizers_shards_are_refused_by_name(tokens):
    with pytest.raises(LineageError, match=r"train/shard-00000\.arrow: .*aaaaaaaaaaaa, not bbbb"):
        TokenShards.open(tokens, "train", OTHER_DIGEST)
    assert TokenShards.open(tokens, "train", None).n_tokens


def test_one_shard_of_another_tokenizer_is_refused_by_name(tokenizer, tokens, tmp_path):
    other = build_tokens(tmp_path / "other", tokenizer, digest=OTHER_DIGEST)
    name = "train/shard-00001.arrow"
    shutil.copyfile(other / name, tokens / name)
    with pytest.raises(LineageError, match=r"shard-00001\.arrow: written with tokenizer bbbb"):
        TokenShards.open(tokens, "train", DIGEST)


def test_another_kind_of_folder_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no manifest"):
        TokenShards.open(tmp_path, "train", None)
    with build_artifact(tmp_path / "x", kind="clean", made_from=[]) as draft:
        (draft.path / "a").touch()
    with pytest.raises(ArtifactError, match="'tokens' expected"):
        TokenShards.open(tmp_path / "x", "train", None)


def test_an_empty_split_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="val: no documents"):
        build_tokens(tmp_path / "t", tokenizer, documents={**DOCUMENTS, "val": []})
    assert not (tmp_path / "t").exists()


def test_wide_vocabularies_take_four_bytes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 70_000)
    wide = build_tokens(tmp_path / "wide", tokenizer)
    shards = TokenShards.open(wide, "val", DIGEST)
    assert shards.stream.shards[0].dtype == np.uint32
    assert tokenizer.decode(next(shards.documents()).tolist()) == DOCUMENTS["val"][0][1]


@pytest.mark.parametrize("size", [0, -1, 2**30 + 1])
def test_impossible_shard_sizes_are_refused(size):
    with pytest.raises(ValueError, match="shard_bytes"):
        EncodeParams(shard_bytes=size)
