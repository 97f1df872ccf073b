r"""Where a text may be cut before BPE: words, numbers of up to three digits, punctuation, spaces.

`PATTERN` is the split of the GPT-4 family with digits in threes, spelled as llama.cpp spells its
`dbrx` pre-tokenizer, so that an exported GGUF file cuts the same way. `split` is the same cut with
the standard library alone, for the readable BPE; a test holds the two together.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

# The same pattern over one letter per character: L letter, N number, R line end, B blank (U+0020),
# S other white space, O anything else. Only the contractions look at the text itself.
_CONTRACTION = re.compile(r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])")
_KINDS = re.compile(r"[BSO]?L+|N{1,3}|B?O+R*|[BSR]*R|[BSR]+(?![LNO])|[BSR]+")

# The White_Space property of Unicode; str.isspace() also takes U+001C to U+001F.
_WHITE_SPACE = frozenset("\t\v\f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {
    chr(code) for code in range(0x2000, 0x200B)
}

# A cut that no pre-token spans, whatever stands around it: between a letter and a space, and after
# a line end before anything that is no white space.
_SAFE_CUT = re.compile(r"(?<=[A-Za-z])(?= )|(?<=\n)(?=\S)")


def split(text: str) -> list[str]:
    """Return the pre-tokens of a text; joined they are the text.

    >>> split("It's 12345 o'clock.")
    ['It', "'s", ' ', '123', '45', ' o', "'clock", '.']
    """
    kinds, pieces, at = "".join(map(_kind, text)), [], 0
    while at < len(text):
        match = _CONTRACTION.match(text, at) or _KINDS.match(kinds, at)
        assert match is not None  # each kind of character begins one of the alternatives
        pieces.append(text[at : match.end()])
        at = match.end()
    return pieces


def chunks(text: str, n_characters: int) -> Iterator[str]:
    """Cut a long text where no pre-token is cut, so that encoding the pieces is encoding the text.

    Args:
        text: any text.
        n_characters: a piece ends at the first safe place after this many characters, 1 or more.
    """
    at = 0
    while len(text) - at > n_characters:
        cut = _SAFE_CUT.search(text, at + n_characters)
        if cut is None:
            break
        yield text[at : cut.start()]
        at = cut.start()
    if at < len(text):
        yield text[at:]


@lru_cache(maxsize=4096)
def _kind(character: str) -> str:
    """Return the letter that stands for the character in `_KINDS`."""
    if character in "\r\n":
        return "R"
    if character == " ":
        return "B"
    if character in _WHITE_SPACE:
        return "S"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"
