"""A running engine on a fake pipeline, with its client on the test's event loop."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pipeserve.core.batch import PipelineFacts
from pipeserve.core.constraint import ConstraintFactory, WatchFactory
from pipeserve.engine.client import EngineClient
from pipeserve.engine.engine import Engine, Inbox
from pipeserve.engine.messages import EngineMessage, SequenceTimes
from tests.fakes import FakePipeline, facts


@dataclass(frozen=True)
class RunningEngine:
    client: EngineClient
    pipeline: FakePipeline


@asynccontextmanager
async def running_engine(
    *,
    pipeline_facts: PipelineFacts | None = None,
    stage_timeout_s: float = 60.0,
    max_queued_requests: int = 1000,
    max_queued_tokens: int | None = None,
    constraints: ConstraintFactory | None = None,
    take_times: Callable[[SequenceTimes], None] | None = None,
    watches: WatchFactory | None = None,
    **pipeline_options: Any,
) -> AsyncIterator[RunningEngine]:
    """Engine, client and fake pipeline; ended when the context is left."""
    loop = asyncio.get_running_loop()
    inbox: Inbox = queue.SimpleQueue()
    pipeline = FakePipeline(pipeline_facts or facts(), inbox.put, **pipeline_options)
    client = EngineClient(
        facts=pipeline.facts,
        post=inbox.put,
        max_queued_requests=max_queued_requests,
        max_queued_tokens=max_queued_tokens,
        take_times=take_times,
    )

    def to_loop(message: EngineMessage) -> None:
        loop.call_soon_threadsafe(client.deliver, message)

    engine = Engine(
        pipeline=pipeline,
        inbox=inbox,
        post=to_loop,
        stage_timeout_s=stage_timeout_s,
        constraints=constraints,
        watches=watches,
    )
    engine.start()
    try:
        yield RunningEngine(client, pipeline)
    finally:
        client.shut_down()
        assert await asyncio.to_thread(engine.join, 10.0), "the engine thread ends"
        pipeline.gate.set()
        await asyncio.to_thread(pipeline.close, 0.2)
