"""The 256 bytes as printable characters: how byte-level BPE writes any bytes into a JSON file.

A byte that prints in Latin-1 stands for itself; the others take the code points from 256 on, in
order (Radford et al. 2019, the GPT-2 vocabulary file). So a space becomes `Ġ` and a newline `Ċ`.
"""

from tinyllm.tokenizer.special import SPECIAL_TOKENS

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))

BYTE_ORDER = (*_PRINTABLE, *sorted(set(range(256)) - set(_PRINTABLE)))
"""The bytes in the order of their characters, which is the order of their token ids."""

_CHARACTERS = tuple(
    chr(byte) if i < len(_PRINTABLE) else chr(256 + i - len(_PRINTABLE))
    for i, byte in enumerate(BYTE_ORDER)
)
_TO_CHARACTER = dict(zip(BYTE_ORDER, _CHARACTERS, strict=True))
_TO_BYTE = dict(zip(_CHARACTERS, BYTE_ORDER, strict=True))

N_RESERVED = len(SPECIAL_TOKENS) + len(BYTE_ORDER)
"""The smallest vocabulary: the special tokens, then every byte."""


def to_characters(raw: bytes) -> str:
    """Return bytes as tokenizer.json spells them.

    >>> to_characters(b" hi")
    'Ġhi'
    """
    return "".join(_TO_CHARACTER[byte] for byte in raw)


def to_bytes(characters: str) -> bytes:
    """Return the bytes of a token spelled as in tokenizer.json.

    Raises:
        KeyError: a character stands for no byte.

    >>> to_bytes("Ġhi")
    b' hi'
    """
    return bytes(_TO_BYTE[character] for character in characters)
