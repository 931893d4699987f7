"""What signals ask of the daemon. Construct on the event loop, which then gets them."""

from __future__ import annotations

import asyncio
import signal
import sys


class Signals:
    """SIGTERM and SIGINT: the first asks for an orderly stop, the second for an immediate one.
    SIGHUP asks to read the options again; from a terminal that closes, to stop."""

    def __init__(self) -> None:
        self.asked_to_stop = asyncio.Event()
        self.asked_to_stop_now = asyncio.Event()
        self.asked_to_reload = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._note_stop)
        has_terminal = sys.stdin is not None and sys.stdin.isatty()
        on_hangup = self._note_stop if has_terminal else self.asked_to_reload.set
        loop.add_signal_handler(signal.SIGHUP, on_hangup)

    def _note_stop(self) -> None:
        (self.asked_to_stop_now if self.asked_to_stop.is_set() else self.asked_to_stop).set()
