import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_text import made_up_text, real_text
from tokenizers import Regex, pre_tokenizers

from tinyllm.tokenizer.alphabet import BYTE_ORDER, to_bytes, to_characters
from tinyllm.tokenizer.split import PATTERN, chunks, split

LIBRARY = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
# Characters of later Unicode versions than Python's are unknown to one side only.
KNOWN = st.characters(exclude_categories=["Cs", "Cn"])
TRICKY = st.sampled_from(
    [*"aZé1Ⅷ²' \t\n\r\x1c\x85\u3000.-😀\u0301", "   ", "'s", "'LL", "\r\n", "12345"]
)


def library_split(text: str) -> list[str]:
    return [piece for piece, _ in LIBRARY.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Hello world", ["Hello", " world"]),
        ("it's WE'LL", ["it", "'s", " WE", "'LL"]),
        ("12345", ["123", "45"]),
        ("a  b", ["a", " ", " b"]),
        ("end.\n\n next", ["end", ".\n\n", " next"]),
        ("", []),
    ],
)
def test_cuts_by_hand(text, pieces):
    assert split(text) == pieces


@given(st.lists(st.one_of(TRICKY, KNOWN), max_size=30).map("".join))
def test_equals_the_library_on_any_text(text):
    assert split(text) == library_split(text)
    assert "".join(split(text)) == text


def test_equals_the_library_on_every_character():
    for code in range(0, 0x20000):
        character = chr(code)
        if unicodedata.category(character) not in ("Cs", "Cn"):
            text = f"a{character}a1{character} {character}"
            assert split(text) == library_split(text), hex(code)


@example("a   b", 2)
@example("a\n\n\n b", 2)
@example("a.\n\r\n", 1)
@example("a  \n b", 2)
@given(st.lists(st.one_of(TRICKY, KNOWN), max_size=60).map("".join), st.integers(1, 10))
def test_chunks_never_cut_a_pre_token(text, size):
    pieces = list(chunks(text, size))
    assert "".join(pieces) == text
    assert [word for piece in pieces for word in library_split(piece)] == library_split(text)


def test_chunks_are_as_long_as_asked():
    pieces = list(chunks(real_text(100_000) + made_up_text(5000), 1000))
    assert 1000 <= min(map(len, pieces[:-1])) <= max(map(len, pieces)) < 1200


def test_alphabet_equals_the_library():
    assert sorted(to_characters(bytes(range(256)))) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert [to_characters(bytes([byte])) for byte in BYTE_ORDER] == sorted(
        pre_tokenizers.ByteLevel.alphabet()
    )
    assert to_bytes(to_characters(bytes(range(256)))) == bytes(range(256))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert byte_level.pre_tokenize_str(" é\n😀")[0][0] == to_characters(" é\n😀".encode())
