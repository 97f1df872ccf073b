"""Repair a text: Unicode form, mojibake, control characters, boilerplate lines, white space.

Line structure stays: a line of verse is a line afterwards, with its indentation.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import ftfy
from ftfy.badness import is_bad

_LINE_ENDS = re.compile("\r\n?|[\u2028\u2029\x0b\x0c\x85]")
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u2060\ufeff\ufff9-\uffff]"
)
_TRAILING = re.compile(r"[ \t\u00a0]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{4,}")
_EMAIL = re.compile(r"\b[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}\b")
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,4}\d{2,4}"  # +49 30 1234 5678
    r"|\(\d{2,5}\) ?\d{3,4}[ .-]?\d{3,4}"  # (030) 123-4567
    r"|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-])"  # 555-123-4567
)


class Normalized(NamedTuple):
    """A repaired text and what was done to it."""

    text: str
    encoding_repaired: bool
    """Whether ftfy found and undid a wrong decoding."""
    lines_dropped: int
    """Boilerplate lines."""
    contacts_scrubbed: int
    """E-mail addresses and phone numbers."""


def normalize(text: str, drop_lines: Sequence[str], scrub: bool) -> Normalized:
    """Return the text in NFC, without mojibake, control characters and boilerplate lines.

    Args:
        text: any.
        drop_lines: a line with one of these words in it goes (any case).
        scrub: whether e-mail addresses and phone numbers are replaced.
    """
    repaired = False
    if not text.isascii():  # the gate: ftfy reads 3 MB/s, isascii 10 GB/s
        if is_bad(text):
            fixed = ftfy.fix_encoding(text)
            repaired, text = fixed != text, fixed
        text = unicodedata.normalize("NFC", text)
    text = _CONTROL.sub("", _LINE_ENDS.sub("\n", text))
    text, n_lines = drop_boilerplate(text, drop_lines)
    n_contacts = 0
    if scrub:
        text, n_emails = _EMAIL.subn("[email]", text)
        text, n_phones = _PHONE.subn("[phone]", text)
        n_contacts = n_emails + n_phones
    text = _BLANK_LINES.sub("\n\n\n", _TRAILING.sub("", text)).strip("\n")
    return Normalized(text, repaired, n_lines, n_contacts)


def drop_boilerplate(text: str, words: Sequence[str]) -> tuple[str, int]:
    r"""Return the text without the lines that contain one of the words, and how many those were.

    >>> drop_boilerplate("To be\nplease enable JavaScript\nor not", ["javascript"])
    ('To be\nor not', 1)
    """
    lowered = text.lower()
    found = [word.lower() for word in words if word.lower() in lowered]
    if not found:
        return text, 0
    lines = text.split("\n")
    kept = [line for line in lines if not any(word in line.lower() for word in found)]
    return "\n".join(kept), len(lines) - len(kept)
