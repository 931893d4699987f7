"""ServiceRate: how fast something has lately been served, and when so much more will have been.

Owned by the event loop. The clock is what it is told.
"""

from __future__ import annotations

from collections import deque

WINDOW = 64
"""Events that the rate is computed from."""
LONGEST_S = 600


class ServiceRate:
    """Counts only the time in which there was something to serve: after an idle night the rate is
    that of the evening before."""

    def __init__(self) -> None:
        self._events: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._busy_s = 0.0
        self._busy_since_s: float | None = None

    def begin(self, now_s: float) -> None:
        """From now on there is something to serve."""
        if self._busy_since_s is None:
            self._busy_since_s = now_s

    def pause(self, now_s: float) -> None:
        """All was served."""
        self._busy_s = self._busy_time_s(now_s)
        self._busy_since_s = None

    def note(self, amount: float, now_s: float) -> None:
        """So much was served at this moment."""
        self._events.append((self._busy_time_s(now_s), amount))

    def seconds_until(self, amount: float, now_s: float) -> int:
        """Whole seconds in which so much will be served, 1 to LONGEST_S; 1 while nothing is known.

        What was served at the window's first moment counts only as its beginning.
        """
        if len(self._events) < 2:
            return 1
        span_s = self._busy_time_s(now_s) - self._events[0][0]
        served = sum(amount for _, amount in self._events) - self._events[0][1]
        if served <= 0.0:
            return 1
        return max(1, min(LONGEST_S, round(amount * span_s / served)))

    def _busy_time_s(self, now_s: float) -> float:
        since_s = now_s if self._busy_since_s is None else self._busy_since_s
        return self._busy_s + now_s - since_s
