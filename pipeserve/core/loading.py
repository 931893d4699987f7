"""What is reported while a model loads. Made on loading threads, read by whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgress:
    """How far one stage is."""

    stage: int
    """From 0."""
    num_stages: int
    num_read: int
    """Bytes of the stage's tensors that are read."""
    num_bytes: int
    """Bytes of all its tensors in the file."""

    @property
    def percent(self) -> int:
        return 100 * self.num_read // max(1, self.num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadNotice:
    """Something that the user should know and that stops nothing."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What was decided or measured on the way."""

    text: str


LoadEvent = StageProgress | LoadNotice | LoadReport

OnProgress = Callable[[LoadEvent], None]
"""Called from loading threads, one call at a time."""
