"""Which language a text is in, by py3langid (Lui & Baldwin 2012, ACL system demonstrations)."""

from collections.abc import Sequence

from py3langid.langid import MODEL_FILE, LanguageIdentifier

SAMPLE_CHARS = 2000
"""From the middle of a text: its beginning is often a title page."""


class LanguageFilter:
    """Keeps texts in one of the given languages."""

    def __init__(self, languages: Sequence[str], threshold: float) -> None:
        self._languages = frozenset(languages)
        self._threshold = threshold
        self._identifier = (
            LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True) if languages else None
        )

    def __call__(self, text: str) -> str | None:
        """Return None (keep) or the reason to drop."""
        if self._identifier is None:
            return None
        start = max(0, (len(text) - SAMPLE_CHARS) // 2)
        ranked = self._identifier.rank(text[start : start + SAMPLE_CHARS])
        probability = sum(float(share) for code, share in ranked if code in self._languages)
        return None if probability >= self._threshold else "language"
