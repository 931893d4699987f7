"""Random load: engine, scheduler and pipeline under arrivals, aborts and preemption at random.

The engine's messages come to the test's thread, which submits and aborts in answer; every token,
and the logits of a sample of steps, are kept by sequence for a comparison afterwards.
"""

from __future__ import annotations

import itertools
import queue
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from pipeserve.config import Config
from pipeserve.core.admission import AdmissionParams
from pipeserve.core.batch import IntArray, MicroBatch, PipelineFacts
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.engine import Engine, Inbox
from pipeserve.engine.messages import (
    Abort,
    EngineMessage,
    GetStats,
    Shutdown,
    StatsReply,
    Submit,
    TokenEvents,
)
from pipeserve.engine.reserve import OutputReserve
from pipeserve.engine.stats import EngineStats
from pipeserve.gguf.reader import GGUFFile
from pipeserve.runtime.late_sampler import LateSampler
from pipeserve.runtime.model_runner import ModelRunner
from pipeserve.runtime.pipeline import Pipeline
from pipeserve.runtime.prompt_scorer import ScoredChunk
from pipeserve.runtime.sampled import Sampled
from pipeserve.runtime.sampler import Sampler

PATIENCE_S = 60.0
GREEDY = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
DRAWN = SamplingParams(max_tokens=1, seed=0, temperature=0.6)
FILTERED = SamplingParams(max_tokens=1, seed=0, temperature=0.6, top_k=3)
MIX = (GREEDY, GREEDY, DRAWN, FILTERED)
"""What sequences sample by, in turn."""
SHARING = 0.5
"""Of all prompts, those that begin alike."""
BACKGROUND = 0.3
"""Of all sequences, those that are preempted when others want their rows."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the load: so many sequences alive, with prompts up to this length."""

    num_live: int
    max_prompt: int
    least_output: int = 1
    """Many that start together and are long outgrow the KV cache."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Phases in turn, until they all were and enough tokens came."""

    phases: Sequence[Phase]
    events_per_phase: int
    """Steps with tokens."""
    num_tokens: int
    max_output: int
    abort_chance: float = 0.002
    """Of each live sequence at each step."""
    seed: int = 0


@dataclass(kw_only=True)
class Served:
    """One sequence and what came of it."""

    seq_id: int
    """Its seed too."""
    prompt: tuple[int, ...]
    sampling: SamplingParams
    admission: AdmissionParams = field(default_factory=AdmissionParams)
    token_ids: list[int] = field(default_factory=list)
    is_aborted: bool = False
    admitted_lengths: list[int] = field(default_factory=list)
    """Known tokens at each admission: one, and one more per preemption."""
    logits: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """[V] on the host, of the sampled steps, by (admission, position of the token)."""

    def final_logits(self) -> dict[int, Tensor]:
        """By index of the output token: of the steps whose token was kept."""
        kept = {}
        for (admission, position), logits_V in self.logits.items():
            later = self.admitted_lengths[admission + 1 :]
            index = position - len(self.prompt)
            # A step in flight at a preemption is dropped; its token is sampled again afterwards.
            if index < len(self.token_ids) and all(position < length for length in later):
                kept[index] = logits_V
        return kept


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """What a micro-batch held."""

    num_decode_rows: int
    num_prefill_tokens: int


@dataclass(frozen=True, kw_only=True)
class _Sampling:
    """The rows that a submitted step samples for."""

    rows_S: IntArray
    positions_S: IntArray
    owners: tuple[tuple[Served, int], ...]
    """Each with its admission."""


class _WatchedPipeline:
    """What the engine submits, noted down. Called on the engine's thread."""

    def __init__(self, pipeline: Pipeline, sequences: dict[int, Served]) -> None:
        self.facts: PipelineFacts = pipeline.facts
        self.sizes: set[StepSize] = set()
        self.num_late = 0
        """Tokens that were sampled late."""
        self.sampling: deque[_Sampling] = deque()
        self._pipeline = pipeline
        self._sequences = sequences
        self._owners: dict[int, Served] = {}

    def submit(self, batch: MicroBatch) -> None:
        for start in batch.starts:
            served = self._sequences[start.sampling.seed]
            self._owners[start.row] = served
            served.admitted_lengths.append(len(start.token_ids))
        self.sizes.add(
            StepSize(
                num_decode_rows=batch.num_decode_rows,
                num_prefill_tokens=len(batch.prefill_token_ids),
            )
        )
        if batch.late_seqs_L is not None:
            self.num_late += len(batch.late_seqs_L)
        rows_S = batch.sampled_rows
        if len(rows_S):
            owners = [self._owners[row] for row in rows_S.tolist()]
            self.sampling.append(
                _Sampling(
                    rows_S=rows_S,
                    positions_S=batch.sampled_positions,
                    owners=tuple((s, len(s.admitted_lengths) - 1) for s in owners),
                )
            )
        self._pipeline.submit(batch)

    def describe_stall(self) -> str:
        return self._pipeline.describe_stall()


class LoadedEngine:
    """A running engine that loads are put on, one after another."""

    def __init__(self, pipeline: Pipeline, inbox: Inbox, sequences: dict[int, Served]) -> None:
        self.watched = _WatchedPipeline(pipeline, sequences)
        self.messages: queue.SimpleQueue[EngineMessage] = queue.SimpleQueue()
        self.engine = Engine(
            pipeline=self.watched, inbox=inbox, post=self.messages.put, stage_timeout_s=PATIENCE_S
        )
        self._inbox = inbox
        self._sequences = sequences
        self._seq_ids = itertools.count()

    def run(self, load: Load) -> list[Served]:
        """Everything that was submitted, once nothing of it runs any more."""
        rng = np.random.default_rng(load.seed)
        served: list[Served] = []
        live: dict[int, Served] = {}
        num_events = num_tokens = 0
        for phase in itertools.cycle(load.phases):
            if num_events >= load.events_per_phase * len(load.phases) and (
                num_tokens >= load.num_tokens
            ):
                break
            for seq_id in list(live)[phase.num_live :: 2]:  # clients that lose patience
                self._abort(live, seq_id)
            for _ in range(load.events_per_phase):
                while len(live) < phase.num_live:
                    new = self._submit(rng, phase, load)
                    served.append(new)
                    live[new.seq_id] = new
                num_tokens += self._take_tokens(live)
                num_events += 1
                for seq_id in [s for s in live if rng.random() < load.abort_chance]:
                    self._abort(live, seq_id)
        while live:
            self._take_tokens(live)
        return served

    def run_alone(self, sequence: Served) -> list[int]:
        """The tokens of the same prompt and sampling, with nothing beside it."""
        alone = Served(
            seq_id=next(self._seq_ids), prompt=sequence.prompt, sampling=sequence.sampling
        )
        # Under its old seed, by which the pipeline's watch knows a sequence.
        self._sequences[sequence.seq_id] = alone
        self._post_submit(alone)
        live = {alone.seq_id: alone}
        while live:
            self._take_tokens(live)
        return alone.token_ids

    def stats(self) -> EngineStats:
        """Only while nothing runs."""
        self._inbox.put(GetStats(reply_id=0))
        while not isinstance(message := self.messages.get(timeout=PATIENCE_S), StatsReply):
            assert isinstance(message, TokenEvents), message  # of sequences that were aborted
        return message.stats

    def _submit(self, rng: np.random.Generator, phase: Phase, load: Load) -> Served:
        seq_id = next(self._seq_ids)
        params = MIX[seq_id % len(MIX)]
        prompt = rng.integers(
            0, self.watched.facts.vocab_size, rng.integers(1, phase.max_prompt + 1)
        )
        num_same = int(rng.integers(0, len(prompt))) if rng.random() < SHARING else 0
        prompt[:num_same] = np.arange(num_same) % self.watched.facts.vocab_size
        served = Served(
            seq_id=seq_id,
            prompt=tuple(prompt.tolist()),
            sampling=replace(
                params,
                max_tokens=int(rng.integers(phase.least_output, load.max_output + 1)),
                seed=seq_id,
            ),
            admission=AdmissionParams(
                account=str(seq_id % 3), is_background=bool(rng.random() < BACKGROUND)
            ),
        )
        self._sequences[seq_id] = served
        self._post_submit(served)
        return served

    def _post_submit(self, served: Served) -> None:
        self._inbox.put(
            Submit(
                seq_id=served.seq_id,
                prompt_token_ids=served.prompt,
                sampling=served.sampling,
                admission=served.admission,
            )
        )

    def _abort(self, live: dict[int, Served], seq_id: int) -> None:
        live.pop(seq_id).is_aborted = True
        self._inbox.put(Abort(seq_id=seq_id))

    def _take_tokens(self, live: dict[int, Served]) -> int:
        """Wait for one step's tokens; how many were for live sequences."""
        message = self.messages.get(timeout=PATIENCE_S)
        assert isinstance(message, TokenEvents), message
        count = 0
        for seq_id, token_id, reason in zip(
            message.seq_ids, message.token_ids, message.finish_reasons, strict=True
        ):
            served = live.get(seq_id)
            if served is None:  # aborted, and the engine does not know yet
                continue
            served.token_ids.append(token_id)
            count += 1
            if reason is not None:
                assert len(served.token_ids) == served.sampling.max_tokens
                del live[seq_id]
        return count


@contextmanager
def loaded_engine(
    path: Path,
    devices: Sequence[str],
    *,
    record_every: int,
    samples_late: bool | None = None,
    **options: object,
) -> Iterator[LoadedEngine]:
    """An engine on a real pipeline; the logits of one step in `record_every` are recorded."""
    config = Config(**options)  # type: ignore[arg-type]
    inbox: Inbox = queue.SimpleQueue()
    with GGUFFile.open(path) as gguf_file:
        pipeline = Pipeline.start(
            gguf_file,
            config,
            devices,
            post=inbox.put,
            on_progress=lambda event: None,
            samples_late=samples_late,
        )
    loaded = LoadedEngine(pipeline, inbox, {})
    try:
        with _recording(loaded.watched, record_every):
            loaded.engine.start()
            try:
                yield loaded
            finally:
                inbox.put(Shutdown())
                assert loaded.engine.join(PATIENCE_S)
    finally:
        assert pipeline.close(PATIENCE_S)


@contextmanager
def _recording(watched: _WatchedPipeline, every: int) -> Iterator[None]:
    """Only some steps, since copying logits waits for the device and so hides its races."""
    sample, num_calls = ModelRunner._sample, itertools.count()

    def recording(
        self: ModelRunner,
        sampler: Sampler | LateSampler,
        batch: MicroBatch,
        logits_SV: Tensor,
        scored: tuple[ScoredChunk, ...],
    ) -> Sampled:
        if len(batch.sampled_rows):
            step = watched.sampling.popleft()
            np.testing.assert_array_equal(batch.sampled_rows, step.rows_S)
            np.testing.assert_array_equal(batch.sampled_positions, step.positions_S)
            if next(num_calls) % every == 0:
                host_SV = logits_SV.float().cpu().clone()
                keys = zip(step.owners, step.positions_S.tolist(), strict=True)
                for index, ((served, admission), position) in enumerate(keys):
                    served.logits[admission, position] = host_SV[index]
        return sample(self, sampler, batch, logits_SV, scored)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "_sample", recording)
        # With what it learns of outputs, preemption is too rare to be tested.
        patch.setattr(OutputReserve, "num_blocks", lambda self, sequences: 0)
        yield
