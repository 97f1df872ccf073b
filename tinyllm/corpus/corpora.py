"""Readers of three corpora that have a form of their own; each is one small pure function.

A new corpus of an unusual form gets a function here, a name in `sources.Format` and a line in
`formats.py`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_QUOTES = {"``": '"', "''": '"'}
_BEFORE_PUNCTUATION = re.compile(r" +([.,;:?!)\]}%])")
_AFTER_BRACKET = re.compile(r"([(\[{]) +")
_DOUBLED = re.compile(r"([;?!])(?: ?\1)+")
_QUOTED = re.compile(r'" ([^"\n]*?) ?"')
_OPTION = re.compile(r"\b([A-E])\) (.*?)(?= [A-E]\) |\nThe output|$)", re.DOTALL)


def read_tagged_words(text: str) -> str:
    """Return running text from the `word/tag` tokens of the Brown corpus, one sentence per line.

    >>> read_tagged_words("``/`` Who/wps ?/. ?/. ''/'' he/pps asked/vbd (/( twice/rb )/) ./.")
    '"Who?" he asked (twice).'
    """
    lines = []
    for line in text.splitlines():
        words = [word.rsplit("/", 1)[0] for word in line.split()]
        joined = " ".join(_QUOTES.get(word, word) for word in words)
        joined = _DOUBLED.sub(r"\1", _BEFORE_PUNCTUATION.sub(r"\1", joined))
        lines.append(_QUOTED.sub(r'"\1"', _AFTER_BRACKET.sub(r"\1", joined)))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def read_parables(row: Mapping[str, Any]) -> str:
    """Return the fable and its moral from a multiple-choice row: `input[1].content`, `ideal[0]`."""
    story, _, rest = row["input"][1]["content"].partition("Which moral")
    options = dict(_OPTION.findall(rest))
    return f"{story.strip()}\n\nMoral: {options[row['ideal'][0][-1]].strip()}"


def read_chitchat(dialogues: Mapping[str, Any]) -> Iterator[str]:
    """Yield each dialogue as text, one turn per line; a sender's burst of messages is one turn."""
    for key in sorted(dialogues):
        turns = [
            " ".join(message["text"].strip() for message in burst)
            for burst in dialogues[key]["messages"]
        ]
        yield "\n".join(f"- {turn}" for turn in turns if turn.strip())
