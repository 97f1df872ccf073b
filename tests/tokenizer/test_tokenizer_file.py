import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_text import made_up_text, tiny_tokenizer

from tinyllm.errors import ArtifactError, DataError
from tinyllm.tokenizer.alphabet import N_RESERVED
from tinyllm.tokenizer.special import END_OF_TEXT, SPECIAL_TOKENS, USER
from tinyllm.tokenizer.tokenizer import TextStream, Tokenizer
from tinyllm.tokenizer.train import (
    TokenizerParams,
    bytes_per_token,
    sample_texts,
    train_bpe,
)

PARAMS = TokenizerParams(vocab_size=500, min_count=2, sample_bytes=10**9)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_training_is_deterministic_to_the_byte():
    texts = [made_up_text(1500, seed) for seed in range(4)]
    document = train_bpe(texts, PARAMS)
    assert document == train_bpe(texts, PARAMS) == train_bpe(reversed(texts), PARAMS)


def test_special_tokens_and_bytes_come_first(tokenizer):
    assert [tokenizer.id_of(name) for name in SPECIAL_TOKENS] == [0, 1, 2, 3, 4, 5]
    assert sorted(tokenizer.token_bytes(i) for i in range(6, N_RESERVED)) == [
        bytes([byte]) for byte in range(256)
    ]


@given(ANY_TEXT)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.n_bytes(ids) == len(text.encode())
    assert tokenizer.encode_batch([text, "x", text]) == [ids, tokenizer.encode("x"), ids]


@given(st.lists(st.integers(0, 499), max_size=40))
def test_decode_equals_the_library(tokenizer, ids):
    for skip in (True, False):
        ours = tokenizer.decode(ids, skip_special=skip)
        if "\ufffd" not in ours:  # the library decodes between special tokens piece by piece
            assert ours == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.integers(0, 499), max_size=40))
def test_streamed_text_is_the_decoded_text(tokenizer, ids):
    stream = TextStream(tokenizer)
    assert "".join(stream.feed(i) for i in ids) + stream.finish() == tokenizer.decode(ids)


def test_stream_holds_back_incomplete_characters(tokenizer):
    byte_ids = [next(i for i in range(6, 262) if tokenizer.token_bytes(i) == bytes([b]))
                for b in "é😀".encode()]  # fmt: skip
    stream = TextStream(tokenizer)
    assert [stream.feed(i) for i in byte_ids] == ["", "é", "", "", "", "😀"]
    assert stream.feed(byte_ids[0]) + stream.finish() == "\ufffd"


def test_special_names_in_text_stay_text(tokenizer):
    text = f"a{USER}b{END_OF_TEXT}"
    ids = tokenizer.encode(text)
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text]) == [ids]
    with_special = tokenizer.encode(text, allow_special=True)
    assert with_special == [*tokenizer.encode("a"), 2, *tokenizer.encode("b"), 0]
    assert tokenizer.decode(with_special) == "ab"
    assert tokenizer.decode(with_special, skip_special=False) == text


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.encode_batch(["a\ud800b"]) == [tokenizer.encode("a\ufffdb")]


def test_long_texts_are_encoded_as_if_in_one_piece(tokenizer):
    text = made_up_text(60_000)
    assert len(text) > 200_000
    expected = tokenizer.backend.encode(text.replace("<|user|>", "")).ids
    assert tokenizer.encode_batch([text.replace("<|user|>", "")]) == [expected]


def test_load_takes_a_file_or_its_folder(tokenizer, tmp_path):
    document = tokenizer.backend.to_str()
    (tmp_path / "tokenizer.json").write_text(document, encoding="utf-8")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert Tokenizer.load(path).encode("the end") == tokenizer.encode("the end")


def _swap_special(document):
    document["added_tokens"].reverse()


def _odd_character(document):
    vocabulary = document["model"]["vocab"]
    vocabulary["\u4f60"] = vocabulary.pop("A")


def _bad_merge(document):
    document["model"]["merges"].append(["A", "\u4f60"])


@pytest.mark.parametrize("damage", [_swap_special, _odd_character, _bad_merge])
def test_damaged_content_is_refused_in_one_line(tokenizer, tmp_path, damage):
    document = json.loads(tokenizer.backend.to_str())
    damage(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: damaged") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"model": {"vocab": [1]}}'])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        Tokenizer.load(tmp_path)


def test_truncated_and_missing_files_are_refused(tokenizer, tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        Tokenizer.load(tmp_path)
    document = tokenizer.backend.to_str()
    (tmp_path / "tokenizer.json").write_text(document[: len(document) // 2], encoding="utf-8")
    with pytest.raises(ArtifactError, match="damaged"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 261}, "vocab_size: 261 has no room for 256 bytes and 6 special tokens"),
        ({"min_count": 0}, "min_count"),
        ({"sample_bytes": 0}, "sample_bytes"),
    ],
)
def test_impossible_parameters_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TokenizerParams(**{"vocab_size": 262, "min_count": 1, "sample_bytes": 1, **change})


def test_smallest_vocabulary_works():
    params = TokenizerParams(vocab_size=262, min_count=1, sample_bytes=10**9)
    tokenizer = Tokenizer(train_bpe(["some text, some text"], params))
    assert tokenizer.vocab_size == 262
    assert len(tokenizer.encode("é")) == 2


def test_no_text_is_refused(tokenizer):
    with pytest.raises(DataError, match="no text"):
        train_bpe([], PARAMS)
    with pytest.raises(DataError, match="no text"):
        bytes_per_token(tokenizer, [""])


def test_bytes_per_token(tokenizer):
    texts = ["the end é", "x"]
    n_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert bytes_per_token(tokenizer, texts) == 11 / n_tokens


def test_sample_is_bounded_and_spread_over_the_documents():
    texts = [made_up_text(50, seed) for seed in range(200)]
    total = sum(len(text.encode()) for text in texts)
    assert list(sample_texts(lambda: texts, total)) == texts
    sample = list(sample_texts(lambda: texts, total // 4))
    assert 0.15 * total < sum(len(text.encode()) for text in sample) <= total / 4
    assert {texts.index(text) // 50 for text in sample} == {0, 1, 2, 3}
    assert list(sample_texts(lambda: texts, total // 4)) == sample
