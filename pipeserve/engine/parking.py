"""Parking: sequences that are in no line before what they need has come. Owned by the engine
thread."""

from __future__ import annotations

from collections.abc import Callable

from pipeserve.engine.sequence import Sequence

EnterLine = Callable[[Sequence], None]


class Parking:
    """Those that wait for a mask or for a watch, and how each gets into the line."""

    def __init__(self) -> None:
        self._parked: dict[Sequence, EnterLine] = {}

    def __len__(self) -> int:
        return len(self._parked)

    def pass_by(self, sequence: Sequence, enter_line: EnterLine) -> None:
        """A sequence wants into the line: it parks here if it lacks something."""
        if sequence.is_unready:
            self._parked[sequence] = enter_line
        else:
            enter_line(sequence)

    def leave(self, sequence: Sequence) -> None:
        """What a sequence lacked has come; it may be running already."""
        enter_line = self._parked.pop(sequence, None)
        if enter_line is not None:
            enter_line(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """A sequence has ended; whether it was parked."""
        return self._parked.pop(sequence, None) is not None
