"""The daemon with a last stage that fails on demand: SIGUSR1 makes it raise, SIGUSR2 block.

Run as a program in place of `python -m pipeserve`.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

from pipeserve.cli import main
from pipeserve.runtime.model_runner import ModelRunner

asked: list[str] = []
run = ModelRunner.run


def faulty_run(self: ModelRunner, batch: Any, hidden_TD: Any) -> Any:
    if asked and threading.current_thread().name == "stage-1":
        if asked[0] == "raise":
            raise RuntimeError("told to fail")
        threading.Event().wait()
    return run(self, batch, hidden_TD)


signal.signal(signal.SIGUSR1, lambda *_: asked.append("raise"))
signal.signal(signal.SIGUSR2, lambda *_: asked.append("block"))
ModelRunner.run = faulty_run  # type: ignore[method-assign]
main()
