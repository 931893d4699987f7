"""The load tools that start a daemon of their own, for a few seconds each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import python_path

LOADTEST = Path(__file__).parents[2] / "loadtest"

pytestmark = pytest.mark.usefixtures("demo_model_path")


def run(tool: str, *options: str) -> list[str]:
    """The lines that it prints; it must end well."""
    done = subprocess.run(
        [sys.executable, str(LOADTEST / tool), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": python_path()},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("processes", ["one", "two"])
def test_a_crowd_on_slow_stages_leaves_nothing_behind(processes: str) -> None:
    """In so short a time memory is still being met for the first time, and is not judged."""
    crowd = ["--streams=60", "--minutes=0.1", "--delay=0.05", "--max-memory-growth=2"]
    serve = ["--devices=cpu,cpu", "--max-num-seqs=32", f"--processes={processes}"]
    lines = run("soak.py", *crowd, "--", *serve)
    assert len([line for line in lines if line.startswith("yes ")]) == 7


def test_what_big_answers_hold_up_is_measured() -> None:
    serve = ["--processes=two", "--drain-timeout-s=0.1"]
    nothing, *rows = run("big_answers.py", "--share=0.01", "--", *serve)
    assert nothing.startswith("nothing: 0.0 MB")
    assert len(rows) == 5
    assert all("longest gap of a stream" in row for row in rows)


@pytest.mark.parametrize("processes", ["one", "two"])
def test_the_cost_of_tokens_is_measured(processes: str) -> None:
    lines = run("http_cost.py", "--streams=8", "--max-tokens=40", f"--processes={processes}")
    header, *rows = (line.split() for line in lines)
    assert header[0] == "us/token"
    assert len(rows) == 3
    assert all(float(row[0]) > 0 and int(row[1]) > 0 for row in rows)
