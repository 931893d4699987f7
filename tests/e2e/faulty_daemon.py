"""The daemon with a last stage that fails on demand: SIGUSR1 makes it raise, SIGUSR2 block.

Run as a program in place of `python -m pipeserve`. With `--processes two` the engine process, for
which this file stands too, takes the signals.
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from pipeserve import engine_child, engine_process
from pipeserve.cli import main

asked: list[str] = []


def make_faulty() -> None:
    from pipeserve.runtime.model_runner import ModelRunner

    run = ModelRunner.run

    def faulty_run(self: ModelRunner, *arguments: Any) -> Any:
        if asked and threading.current_thread().name == "stage-1":
            if asked[0] == "raise":
                raise RuntimeError("told to fail")
            threading.Event().wait()
        return run(self, *arguments)

    ModelRunner.run = faulty_run  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, lambda *_: asked.append("raise"))
    signal.signal(signal.SIGUSR2, lambda *_: asked.append("block"))


if "serve" not in sys.argv:
    make_faulty()
    engine_child.main()
if "two" not in sys.argv:
    make_faulty()
engine_process.child_command = lambda: [sys.executable, __file__]
main()
