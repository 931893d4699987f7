"""Restarts: how soon a failed engine process is started again, and when no more."""

from __future__ import annotations

MAX_FAILURES = 4
"""Failures in a row, after the last of which the daemon ends."""
STEADY_S = 60.0
"""An engine that served this long ends the row: its failure counts as the first."""


class Restarts:
    """Counts failures in a row. Owned by whoever starts the engine."""

    def __init__(self) -> None:
        self._num_failures = 0

    def note_failure(self, *, served_s: float) -> float | None:
        """Seconds to wait before the next start; None if there is to be none.

        served_s: how long the engine that failed took requests; 0 if it never did.
        """
        self._num_failures = 1 if served_s >= STEADY_S else self._num_failures + 1
        if self._num_failures >= MAX_FAILURES:
            return None
        return 0.0 if self._num_failures == 1 else 2.0 ** (self._num_failures - 2)
