"""LoadRunner: puts loads on a running engine, in the place of the front half."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from pipeserve.bench.arrivals import Lengths, Request
from pipeserve.bench.chained import Chained, greedy
from pipeserve.bench.recording import Recorder, Recording
from pipeserve.bench.timeline import Timeline
from pipeserve.bench.tracing import MOST_TOKENS, Profile, SteadyDecode, trace_decode
from pipeserve.bench.workload import Batch, Load, Workload
from pipeserve.core.batch import PipelineFacts
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.engine import Inbox
from pipeserve.engine.messages import EngineFailed, EngineMessage, Submit

WARM_UP_TOKENS = 4
"""Output of the sequences that run before each measured run, to compile and fill caches."""
WARM_UP_SEQUENCES = 64
"""Of them, at most, where the load does not say how many run at once."""


class LoadRunner:
    """Runs loads on an engine, one after another. `deliver` is called on the engine's thread."""

    def __init__(self, inbox: Inbox, timeline: Timeline, *, vocab_size: int) -> None:
        self._inbox = inbox
        self._timeline = timeline
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(0)
        self._seq_ids = itertools.count()
        self._listener: Callable[[EngineMessage], None] | None = None
        self._failure: EngineFailed | None = None

    def deliver(self, message: EngineMessage) -> None:
        """Take a message from the engine; on its thread."""
        if isinstance(message, EngineFailed):
            self._failure = message
        if self._listener is not None:
            self._listener(message)

    def warm_up(self, workload: Workload, load: Load) -> None:
        """The load's prompts at once, with few tokens of output. Errors as `run`."""
        few = min(WARM_UP_TOKENS, workload.output.longest)
        count = load.num_concurrent or min(load.num_sequences, WARM_UP_SEQUENCES)
        short = replace(workload, output=Lengths(choices=(few,)))
        self.run(short, Batch(num_sequences=count))

    def run(self, workload: Workload, load: Load, *, most_s: float = math.inf) -> Recording:
        """most_s: clients submit no longer than this.

        Raises:
            StageFailedError, StageStalledError: the engine died.
        """
        trace = workload.make_trace(load)
        submissions = self._submissions(
            trace.requests, workload.num_shared_tokens, workload.chained
        )
        self._timeline.clear()
        recorder = Recorder(
            post=self._inbox.put, trace=trace, submissions=submissions, most_s=most_s
        )
        self._listen(recorder.deliver)
        return recorder.run()

    def trace(
        self,
        workload: Workload,
        num_concurrent: int,
        facts: PipelineFacts,
        devices: Sequence[torch.device],
    ) -> tuple[Profile, ...]:
        """Trace a steady decode of so many sequences; errors as `run`."""
        row_blocks = min(
            facts.num_blocks // num_concurrent, facts.context_length // facts.block_size
        )
        prompt = workload.prompt.longest
        room = row_blocks * facts.block_size - prompt
        lasting = Request(
            arrival_s=0.0,
            num_prompt_tokens=prompt,
            num_output_tokens=max(1, min(room, MOST_TOKENS)),
        )
        batch = self._submissions([lasting] * num_concurrent, 0)
        steady = SteadyDecode(post=self._inbox.put, batch=batch)
        self._listen(steady.deliver)
        return trace_decode(steady, num_concurrent=num_concurrent, devices=devices)

    def _listen(self, listener: Callable[[EngineMessage], None]) -> None:
        self._listener = listener
        if self._failure is not None:  # between two runs
            listener(self._failure)

    def _submissions(
        self,
        requests: Sequence[Request],
        num_shared_tokens: int,
        chained: Chained | None = None,
    ) -> list[Submit]:
        """Prompts that share no more than they should, and tokens without a stop."""
        shared, count = self._token_ids(num_shared_tokens), len(requests)
        submissions = []
        for index, request in enumerate(requests):
            max_tokens = request.num_output_tokens
            sampling = greedy(max_tokens)
            if chained is not None:
                sampling = chained.sampling(index, num_sequences=count, max_tokens=max_tokens)
            submissions.append(self._submission(request, shared, sampling))
        return submissions

    def _submission(
        self, request: Request, shared: tuple[int, ...], sampling: SamplingParams
    ) -> Submit:
        num_prompt_tokens = request.num_prompt_tokens
        own = self._token_ids(num_prompt_tokens)
        if num_prompt_tokens > len(shared):
            own = shared + own[len(shared) :]
        return Submit(seq_id=next(self._seq_ids), prompt_token_ids=own, sampling=sampling)

    def _token_ids(self, count: int) -> tuple[int, ...]:
        return tuple(self._rng.integers(0, self._vocab_size, count).tolist())
