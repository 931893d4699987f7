"""The daemon with a stage that is slow now and then, for soak.py.

Run as a program in place of `python -m pipeserve`: MAX_S, then the arguments. For PERIOD_S seconds
each, one of the stages, drawn anew, takes up to MAX_S longer for every step, or none of them does.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from typing import Any

from pipeserve import engine_child, engine_process
from pipeserve.cli import main

PERIOD_S = 4.0

max_delay_s = float(sys.argv.pop(1))


def slow_now() -> str | None:
    """The name of the slow stage's thread: the same answer on every thread within a period."""
    stages = [each.name for each in threading.enumerate() if each.name.startswith("stage-")]
    rng = random.Random(int(time.monotonic() / PERIOD_S))
    return rng.choice([None, *sorted(stages)])


def slow_stages_down() -> None:
    from pipeserve.runtime.model_runner import ModelRunner

    run = ModelRunner.run

    def slow_run(self: ModelRunner, *arguments: Any) -> Any:
        if threading.current_thread().name == slow_now():
            time.sleep(random.uniform(0.0, max_delay_s))
        return run(self, *arguments)

    ModelRunner.run = slow_run  # type: ignore[method-assign]


if "serve" not in sys.argv:
    slow_stages_down()
    engine_child.main()
if "two" not in sys.argv:
    slow_stages_down()
engine_process.child_command = lambda: [sys.executable, __file__, str(max_delay_s)]
main()
