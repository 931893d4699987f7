"""The engine process with a fake pipeline in place of the model, and without torch.

Run as a program in place of `-m pipeserve.engine_child`: FIRST LATER MARKER FD. Does what FIRST
says while there is no file MARKER, then what LATER says: serve, or fail in one of the ways below.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import types
from pathlib import Path
from typing import Any

from pipeserve import engine_child
from pipeserve.core.layout import LayoutForecast, LayoutSurvey
from pipeserve.core.loading import StageProgress
from pipeserve.engine.engine import Engine
from pipeserve.engine.messages import EngineFailed, Load, Loaded, SurveyLayouts
from pipeserve.engine.wire import Wire
from pipeserve.errors import UnsupportedModelError
from tests.fakes import FakePipeline, facts

STEP_S = 0.01


class FakeHalf:
    """Stands for pipeserve.engine_half.EngineHalf."""

    def __init__(self, order: Load, inbox: Any) -> None:
        self.facts = facts(context_length=1024, num_blocks=512)
        self._order = order
        self._inbox = inbox

    @classmethod
    def load(cls, order: Load, *, inbox: Any, on_progress: Any) -> FakeHalf:
        on_progress(StageProgress(stage=0, num_stages=1, num_read=1, num_bytes=1))
        if mode == "unsupported":
            raise UnsupportedModelError(order.model_path, "architecture 'gpt5' is not built in")
        if mode == "bug":
            raise RuntimeError("told to fail")
        if mode == "slow":
            signal.pause()
        return cls(order, inbox)

    def start(self, deliver: Any) -> None:
        self._pipeline = FakePipeline(self.facts, self._inbox.put, step_s=STEP_S)
        self._engine = Engine(
            pipeline=self._pipeline,
            inbox=self._inbox,
            post=deliver,
            stage_timeout_s=self._order.config.stage_timeout_s,
        )
        self._engine.start()

    def wait_ended(self) -> None:
        self._engine.join(None)
        if mode == "deaf":
            signal.pause()

    def close(self, timeout_s: float) -> None:
        self._pipeline.close(timeout_s)


def survey(order: SurveyLayouts) -> LayoutSurvey:
    """Two devices that do more apart than together."""
    forecasts = (
        LayoutForecast(num_replicas=1, output_tokens_per_s=1000.0),
        LayoutForecast(num_replicas=2, output_tokens_per_s=1200.0),
    )
    return LayoutSurvey(devices=("cuda:0", "cuda:1"), forecasts=forecasts)


first, later, marker = sys.argv[1], sys.argv[2], Path(sys.argv[3])
mode = later if marker.exists() else first
marker.touch()
module = types.ModuleType("pipeserve.engine_half")
module.EngineHalf, module.survey = FakeHalf, survey  # type: ignore[attr-defined]
sys.modules[module.__name__] = module
if mode == "at-once":
    wire = Wire(socket.socket(fileno=int(sys.argv[-1])))
    wire.send((Loaded(facts=facts()), EngineFailed(error="stage 0 failed", stalled=False)))
    sys.exit(1)
if mode == "exit":
    sys.exit(3)
if mode == "crash":
    os.abort()
if mode == "leave":
    socket.socket(fileno=int(sys.argv[-1])).close()
    signal.pause()
if mode == "rubbish":
    socket.socket(fileno=int(sys.argv[-1])).sendall(b"Traceback (most recent call last)")
    signal.pause()
engine_child.main()
