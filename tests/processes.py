"""Processes that tests start: how they find the tests' modules, and whether they still run."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python_path() -> str:
    """PYTHONPATH for a program that imports from tests."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])


def is_running(pid: int) -> bool:
    """False for a process that is gone, or is dead and waits for its parent to ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
