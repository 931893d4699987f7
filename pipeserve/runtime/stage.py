"""Stage: one thread that owns one device's share of the model and works through its link in order.

Knows its neighbours only as links, and the engine only as a function to post results to.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from pipeserve.core.batch import MicroBatch, StageFailure
from pipeserve.runtime.collector import Collector, Post, make_output
from pipeserve.runtime.devices import stage_stream
from pipeserve.runtime.link import Handoff, Link
from pipeserve.runtime.sampled import Sampled
from pipeserve.runtime.step_clock import make_clock
from pipeserve.runtime.token_pool import TokenPool
from pipeserve.runtime.transfer import Transfer


class Runner(Protocol):
    """What computes a stage's steps."""

    def run(self, batch: MicroBatch, hidden_TD: torch.Tensor | None) -> torch.Tensor | Sampled:
        """The hidden states for the next stage, or on the last stage what was sampled."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outlet:
    """To the next stage: its link, and the way of the hidden states to its device."""

    link: Link
    transfer: Transfer


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """The step that a stage is computing."""

    step_id: int
    since_s: float
    """By time.monotonic."""


class Stage:
    """Takes micro-batches from `inlet`, passes them to `outlet`; the last stage posts instead, or
    leaves that to `collector`. On a GPU everything that it launches goes to a stream of its own."""

    def __init__(
        self,
        *,
        index: int,
        device: torch.device,
        num_threads: int,
        runner: Runner,
        token_pool: TokenPool,
        inlet: Link,
        outlet: Outlet | None,
        collector: Collector | None,
        post: Post,
        on_failure: Callable[[], None],
    ) -> None:
        self.index = index
        self.device = device
        self._num_threads = num_threads
        self._runner = runner
        self._token_pool = token_pool
        self._inlet = inlet
        self._outlet = outlet
        self._collector = collector
        self._post = post
        self._on_failure = on_failure
        self._activity: Activity | None = None
        # A daemon thread: one that is blocked for ever must not keep the process alive.
        self.thread = threading.Thread(target=self._main, name=f"stage-{index}", daemon=True)

    @property
    def name(self) -> str:
        """For people."""
        return f"stage {self.index} ({self.device})"

    @property
    def activity(self) -> Activity | None:
        """What the stage computes now, None while it waits. May be read from any thread."""
        return self._activity

    def _main(self) -> None:
        # Sets OpenMP's and MKL's counts, which each thread has for itself, and a default that a
        # thread takes over when it first asks; asking at once makes this thread's count final.
        torch.set_num_threads(self._num_threads)
        torch.get_num_threads()
        try:
            with self._own_stream(), torch.inference_mode():
                self._work()
        except Exception as error:
            self._post(StageFailure(stage=self.index, error=f"{type(error).__name__}: {error}"))
            self._on_failure()

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Kernels of this thread run on the stage's device, beside those of other stages."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.set_device(self.device)
        stream = stage_stream(self.device)
        with torch.cuda.stream(stream):
            yield
        # What was launched ahead uses memory that whoever closes the pipeline may free.
        stream.synchronize()

    def _work(self) -> None:
        clock = make_clock(self.device)
        while (handoff := self._inlet.receive()) is not None:
            if not self._receive_tokens(handoff.batch):
                return
            self._activity = Activity(step_id=handoff.batch.step_id, since_s=time.monotonic())
            hidden_TD = None if handoff.hidden_TD is None else handoff.hidden_TD.take()
            stop_clock = clock.start()
            result = self._runner.run(handoff.batch, hidden_TD)
            self._activity = None
            self._pass_on(replace(handoff, spans=(*handoff.spans, stop_clock())), result)

    def _receive_tokens(self, batch: MicroBatch) -> bool:
        """On the first stage: take in the ids that decode rows read. False if closed meanwhile."""
        if self.index > 0:
            return True
        is_open = self._token_pool.receive(batch.needs_step)
        if is_open and batch.given is not None:
            self._token_pool.give(batch.given)
        return is_open

    def _pass_on(self, handoff: Handoff, result: torch.Tensor | Sampled) -> None:
        if not isinstance(result, Sampled):
            assert self._outlet is not None, "only the last stage samples"
            arrival = self._outlet.transfer.send(result)
            self._outlet.link.send(replace(handoff, hidden_TD=arrival))
        elif self._collector is not None:
            self._collector.add(handoff, result)
        else:
            self._post(make_output(handoff, result))
