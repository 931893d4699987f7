"""The daemon with tests/fake_engine_child.py as its engine process, impatient where it waits.

Run as a program in place of `python -m pipeserve`: FIRST LATER MARKER, then the arguments.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeserve import daemon, engine_process, restarts
from pipeserve.cli import main

FAKE_CHILD = Path(__file__).parent.parent / "fake_engine_child.py"

arguments = sys.argv[1:4]
engine_process.child_command = lambda: [sys.executable, str(FAKE_CHILD), *arguments]
daemon.STOP_TIMEOUT_S = 0.5
restarts.MAX_FAILURES = 2
main(sys.argv[4:])
