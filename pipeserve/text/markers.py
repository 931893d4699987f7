"""MarkerSearch: where one of several markers begins in a text that comes in parts.

Belongs to one answer. Knows nothing of what the markers mean.
"""

from __future__ import annotations

from collections.abc import Sequence


class MarkerSearch:
    """Gives text out up to a marker, and holds back an end of it that may begin one."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = tuple(markers)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None, str]:
        """Take more text: what comes before a marker, the marker if there is one, the rest."""
        text = self._held + text
        self._held = ""
        places = [(place, m) for m in self._markers if (place := text.find(m)) >= 0]
        if places:
            place, marker = min(places, key=lambda found: (found[0], -len(found[1])))
            return text[:place], marker, text[place + len(marker) :]
        cut = len(text) - self._length_of_beginning(text)
        self._held = text[cut:]
        return text[:cut], None, ""

    def rest(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _length_of_beginning(self, text: str) -> int:
        """Of the longest end of the text that is a beginning of a marker."""
        longest = 0
        for marker in self._markers:
            for length in range(min(len(marker) - 1, len(text)), longest, -1):
                if text.endswith(marker[:length]):
                    longest = length
                    break
        return longest
