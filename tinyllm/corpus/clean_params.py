"""The `clean` section: what a document must be like to be kept, and which documents are held out.

The filters' names and thresholds are those of Gopher (Rae et al. 2021, arXiv:2112.11446, table A1)
and C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2).
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanParams:
    """Thresholds and the split; a share is a number from 0 to 1."""

    scrub_contacts: bool
    """Replace e-mail addresses and phone numbers by `[email]` and `[phone]`."""
    drop_lines: tuple[str, ...]
    """A line goes if it contains one of these, in any case."""
    languages: tuple[str, ...]
    """ISO 639-1 codes, one of which a document must be in; empty: any language."""
    language_threshold: float
    """Least probability that it is."""
    min_doc_words: int
    """Fewest words; a word stands between white space."""
    max_doc_words: int
    """Most words."""
    min_avg_word_length: float
    """In characters."""
    max_avg_word_length: float
    """In characters."""
    max_symbol_word_ratio: float
    """`#` per word, and ellipses per word."""
    max_bullet_lines_ratio: float
    """Share of lines that begin with a bullet."""
    max_ellipsis_lines_ratio: float
    """Share of lines that end with an ellipsis."""
    min_alpha_words_ratio: float
    """Share of words with a letter in them."""
    min_stop_words: int
    """Different ones of: the, be, to, of, and, that, have, with. 0: off, for other languages."""
    dup_line_frac: float
    """Most lines that repeat an earlier one, as a share of the lines."""
    dup_line_char_frac: float
    """The same in characters, as a share of the text."""
    dup_para_frac: float
    """Most paragraphs that repeat an earlier one, as a share of the paragraphs."""
    dup_para_char_frac: float
    """The same in characters, as a share of the text."""
    top_n_grams: dict[str, float]
    """n to the most characters in the commonest n words in a row, as a share of the text."""
    dup_n_grams: dict[str, float]
    """n to the most characters in repeats of n words in a row, as a share of the text."""
    near_duplicate_threshold: float
    """Jaccard similarity of the sets of 5-word shingles from which two documents count as one."""
    val_documents: tuple[str, ...]
    """Held out: documents with one of these in their name."""
    val_share: float
    """Held out of the other documents: this share, by a hash of the clean text."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}: {getattr(self, name)} must be between 0 and 1"
            for name in _SHARES
            if not 0 <= getattr(self, name) <= 1
        ]
        for name in ("top_n_grams", "dup_n_grams"):
            for n, share in getattr(self, name).items():
                if not n.isdigit() or int(n) < 2:
                    problems.append(f"{name}.{n}: must be a number of words, 2 or more")
                if not 0 <= share <= 1:
                    problems.append(f"{name}.{n}: {share} must be between 0 and 1")
        problems += [
            f"languages: {code!r} must be an ISO 639-1 code of two letters, such as en"
            for code in self.languages
            if len(code) not in (2, 3) or not code.islower()
        ]
        if self.min_doc_words > self.max_doc_words:
            problems.append("min_doc_words: more than max_doc_words; no document can be kept")
        if not 0.5 <= self.near_duplicate_threshold <= 1:
            problems.append("near_duplicate_threshold: must be between 0.5 and 1; 0.8 is usual")
        if not self.val_documents and self.val_share == 0:
            problems.append("val_share: 0 without val_documents holds nothing out; try 0.05")
        if "" in self.val_documents:
            problems.append("val_documents: an empty name matches every document")
        if "" in self.drop_lines:
            problems.append("drop_lines: an empty entry matches every line")
        if problems:
            raise ValueError("\n".join(problems))


_SHARES = (
    "language_threshold",
    "max_bullet_lines_ratio",
    "max_ellipsis_lines_ratio",
    "min_alpha_words_ratio",
    "dup_line_frac",
    "dup_line_char_frac",
    "dup_para_frac",
    "dup_para_char_frac",
    "val_share",
)
