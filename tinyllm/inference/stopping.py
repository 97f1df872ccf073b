"""Stop strings in text that comes piece by piece, wherever the pieces are cut.

A tail that may yet become a stop string is held back until it has, or cannot any more.
"""

from collections.abc import Sequence


class StopStrings:
    """Text with everything from the first stop string on cut off."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Take the strings that end a text; an empty one would end every text.

        Raises:
            ValueError: one of them is empty.
        """
        if not all(stops):
            raise ValueError("stop: an empty string ends every text; leave it out")
        self._stops, self._held = tuple(stops), ""
        self.hit = False
        """Whether one of them came; nothing is returned from then on."""

    def feed(self, piece: str) -> str:
        """Return the text that is now sure to belong to the answer."""
        if self.hit:
            return ""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def finish(self) -> str:
        """Return what was held back, once it is known that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text begin a stop string: ("ab", "bc") gives 1."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
