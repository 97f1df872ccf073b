"""The readable BPE against the `tokenizers` library: same merges, same ids."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import made_up_text, real_text

from tinyllm.tokenizer.alphabet import to_characters
from tinyllm.tokenizer.bpe import Bpe
from tinyllm.tokenizer.tokenizer import Tokenizer
from tinyllm.tokenizer.train import TokenizerParams, train_bpe

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
KNOWN_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=80)


def both(texts: list[str], vocab_size: int, min_count: int) -> tuple[Bpe, str]:
    params = TokenizerParams(vocab_size=vocab_size, min_count=min_count, sample_bytes=10**9)
    return Bpe.train(texts, vocab_size, min_count), train_bpe(texts, params)


def library_merges(document: str) -> list[tuple[int, int]]:
    model = json.loads(document)["model"]
    return [(model["vocab"][left], model["vocab"][right]) for left, right in model["merges"]]


@pytest.fixture(scope="module")
def trained():
    return both([real_text(120_000), made_up_text(8000)], 700, 2)


@pytest.fixture(scope="module")
def tokenizer(trained):
    return Tokenizer(trained[1])


def test_same_merges_and_vocabulary(trained):
    bpe, document = trained
    assert len(bpe.merges) > 400
    assert bpe.merges == library_merges(document)
    vocabulary = json.loads(document)["model"]["vocab"]
    assert {to_characters(raw): i for raw, i in bpe._id_of.items()}.items() <= vocabulary.items()
    assert bpe.vocab_size == len(vocabulary)


def test_same_ids_on_text_not_trained_on(trained):
    bpe, document = trained
    text = real_text(200_000)[120_000:160_000] + made_up_text(3000, seed=1)
    assert bpe.encode(text) == Tokenizer(document).encode(text)


@pytest.mark.parametrize(
    "text",
    ["ab ab ba ba", "aaaa aaa aa aaaaaaa", "abab abab", "xyz zyx xyz zyx yy", "------ ---- -- -"],
)
@pytest.mark.parametrize("min_count", [1, 2, 3])
def test_ties_and_overlaps_are_settled_alike(text, min_count):
    bpe, document = both([text], 300, min_count)
    assert bpe.merges == library_merges(document)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab -", min_size=1, max_size=40), min_size=1, max_size=4))
def test_same_merges_and_ids_on_small_alphabets(texts):
    bpe, document = both(texts, 290, 1)
    assert bpe.merges == library_merges(document)
    tokenizer = Tokenizer(document)
    for text in [*texts, "".join(texts)]:
        assert bpe.encode(text) == tokenizer.encode(text)


@given(KNOWN_TEXT)
def test_same_ids_on_any_text(trained, tokenizer, text):
    assert trained[0].encode(text) == tokenizer.encode(text)


@given(ANY_TEXT)
def test_round_trip(trained, text):
    assert trained[0].decode(trained[0].encode(text)) == text


def test_worked_example():
    """`aaabdaaabac` (Gage 1994): aa, then a pair with it, then the whole of aaab."""
    bpe = Bpe.train(["aaabdaaabac"], 6 + 256 + 3)
    spelled = [bpe._bytes[i] for i in bpe.encode("aaabdaaabac")]
    assert spelled == [b"aaab", b"d", b"aaab", b"a", b"c"]
