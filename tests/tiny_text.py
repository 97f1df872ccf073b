"""Text for tests: made up, or the real file beside the repository where there is one."""

import random
from pathlib import Path

from tinyllm.tokenizer.tokenizer import Tokenizer
from tinyllm.tokenizer.train import TokenizerParams, train_bpe

REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "tinyshakespeare.txt"

_SYLLABLES = "th er on an re he in ed nd ha at en es of or nt ea ti to it st io le is ou ar as"
_ODD = [
    "it's", "WE'LL", "don't", "12345", "3.14", "  ", "\n\n", "...", "----", "aaaaaaa", "na\u00efve",
    "你好", "😀😀", "\t", "Ünïcödé", "'tis", "x²", "Ⅷ", "<|user|>", "e\u0301",
]  # fmt: skip


def made_up_text(n_words: int, seed: int = 0) -> str:
    """Words of a skewed vocabulary with punctuation, digits, emoji and runs of blanks."""
    rng = random.Random(seed)
    syllables = _SYLLABLES.split()
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(400)] + _ODD
    weights = [1 / (1 + i % 401) for i in range(len(words))]
    pieces = []
    for word in rng.choices(words, weights, k=n_words):
        pieces.append(word + rng.choices([" ", ", ", ".\n", "\n\n", ""], [70, 12, 10, 3, 5])[0])
    return "".join(pieces)


def real_text(n_characters: int) -> str:
    """The beginning of tinyshakespeare, or made-up text of that length."""
    if REAL.is_file():
        return REAL.read_text(encoding="utf-8")[:n_characters]
    return made_up_text(n_characters // 3, seed=9)[:n_characters]


def tiny_tokenizer(vocab_size: int = 500, seed: int = 0) -> Tokenizer:
    """A tokenizer trained in process, with every byte."""
    params = TokenizerParams(vocab_size=vocab_size, min_count=2, sample_bytes=10**9)
    return Tokenizer(train_bpe([made_up_text(4000, seed)], params))
