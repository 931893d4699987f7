"""Driver: runs prompts through a Pipeline by hand-made micro-batches, without the engine.

A plain scheduler: cohorts in turn, chunks of prompts, blocks dealt out in shuffled order.
"""

from __future__ import annotations

import queue
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from pipeserve.config import Config
from pipeserve.core.batch import (
    GivenTokens,
    IntArray,
    LateOutput,
    MicroBatch,
    PromptLogprobs,
    RowStart,
    StageFailure,
    StepLogprobs,
    StepOutput,
)
from pipeserve.core.sampling import SamplingParams
from pipeserve.gguf.reader import GGUFFile
from pipeserve.runtime.pipeline import Pipeline

PATIENCE_S = 60.0
"""Far longer than any step of a test: a pipeline that says nothing for so long hangs."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One sequence to run."""

    token_ids: Sequence[int]
    sampling: SamplingParams
    num_output_tokens: int = 0
    """How many of the last token_ids count as generated before (a resumed sequence)."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the driver cuts the work into steps; no choice may change a token."""

    chunk_size: int = 32
    num_cohorts: int = 2
    num_look_ahead: int = 1
    seed: int = 0
    """Of the order in which blocks are dealt out."""


@dataclass(kw_only=True)
class Result:
    """What came out of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)
    prompt_logprobs: dict[int, tuple[float, dict[int, float]]] = field(default_factory=dict)
    """By the token's place in the prompt: its own, and those of the likeliest ids."""


@dataclass(kw_only=True)
class _Running:
    row: int
    prompt: Prompt
    result: Result
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_sampled: int = 0
    last_sample_step: int | None = None
    is_late: bool = False
    """Whether that one sampled late."""

    @property
    def has_chain(self) -> bool:
        return self.prompt.sampling.chain is not None

    @property
    def is_decoding(self) -> bool:
        return self.num_computed >= len(self.prompt.token_ids)

    @property
    def is_scheduled_out(self) -> bool:
        return self.num_sampled >= self.prompt.sampling.max_tokens

    @property
    def num_unread(self) -> int:
        return self.num_sampled - len(self.result.token_ids)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One sequence's share of a step."""

    running: _Running
    num_tokens: int
    new_blocks: list[tuple[int, int]]
    """(column, block id)."""

    @property
    def samples(self) -> bool:
        return self.running.num_computed + self.num_tokens >= len(self.running.prompt.token_ids)


class Driver:
    """Owns rows and blocks of a pipeline; `outputs` is what the pipeline posts to."""

    def __init__(
        self,
        pipeline: Pipeline,
        outputs: queue.SimpleQueue[StepOutput | LateOutput | StageFailure],
    ) -> None:
        self.pipeline = pipeline
        self.outputs = outputs
        self.num_steps = 0
        self.num_late = 0
        """Tokens that were sampled late."""
        self._late: dict[int, list[_Running]] = {}
        self._scored: dict[int, Result] = {}
        """By row, which is the name of the sequence."""
        self.stage_busy_s = np.zeros(pipeline.facts.num_stages)

    def generate(self, prompts: Sequence[Prompt], schedule: Schedule | None = None) -> list[Result]:
        """Run all prompts together to their max_tokens; raises AssertionError on a StageFailure."""
        schedule = schedule or Schedule()
        facts = self.pipeline.facts
        assert len(prompts) <= facts.num_rows
        free = list(np.random.default_rng(schedule.seed).permutation(facts.num_blocks))
        everyone = [
            _Running(row=facts.num_rows - 1 - index, prompt=prompt, result=Result())
            for index, prompt in enumerate(prompts)
        ]
        self._scored = {running.row: running.result for running in everyone}
        in_flight: dict[int, list[_Running]] = {}
        while not all(len(r.result.token_ids) == r.prompt.sampling.max_tokens for r in everyone):
            parts = self._plan(everyone, schedule, free, len(in_flight))
            if not parts:
                self._take_output(in_flight)
                continue
            step_id = self.num_steps
            late = self._late_parts(parts)
            self.pipeline.submit(self._build(step_id, parts, late))
            in_flight[step_id] = self._advance(step_id, parts, late)
            self.num_steps += 1
        while in_flight or self._late:
            self._take_output(in_flight)
        self._scored.clear()
        return [running.result for running in everyone]

    def _plan(
        self,
        everyone: list[_Running],
        schedule: Schedule,
        free: list[int],
        num_in_flight: int,
    ) -> list[_Part]:
        if num_in_flight >= schedule.num_cohorts * (1 + schedule.num_look_ahead):
            return []
        # In turn by the next step's number: two steps in a row serve different cohorts.
        cohort = self.num_steps % schedule.num_cohorts
        ready = [r for r in everyone if not r.is_scheduled_out]
        decoding = [
            r
            for index, r in enumerate(everyone)
            if r in ready
            and r.is_decoding
            and r.num_unread <= self._num_look_ahead(r, schedule)
            and (index % schedule.num_cohorts == cohort or num_in_flight == 0)
        ]
        parts = [self._part(r, 1, free) for r in decoding]
        budget = min(schedule.chunk_size, self.pipeline.facts.max_batch_tokens - len(parts))
        for running in ready:
            if running.is_decoding or budget <= 0:
                continue
            num_tokens = min(budget, len(running.prompt.token_ids) - running.num_computed)
            parts.append(self._part(running, num_tokens, free))
            budget -= num_tokens
        return parts

    def _num_look_ahead(self, running: _Running, schedule: Schedule) -> int:
        may_be_late = self.pipeline.facts.samples_late and running.has_chain
        return 0 if may_be_late else schedule.num_look_ahead

    def _late_parts(self, parts: list[_Part]) -> list[_Part]:
        """In a step that samples rows without a chain too, those that have one are late."""
        sampled = [part for part in parts if part.samples]
        if not self.pipeline.facts.samples_late or all(p.running.has_chain for p in sampled):
            return []
        return [part for part in sampled if part.running.has_chain]

    def _part(self, running: _Running, num_tokens: int, free: list[int]) -> _Part:
        needed = -(-(running.num_computed + num_tokens) // self.pipeline.facts.block_size)
        new = [(column, int(free.pop())) for column in range(len(running.blocks), needed)]
        running.blocks.extend(block for _, block in new)
        return _Part(running=running, num_tokens=num_tokens, new_blocks=new)

    def _build(self, step_id: int, parts: list[_Part], late: list[_Part]) -> MicroBatch:
        prefill = [part for part in parts if not part.running.is_decoding]
        needed = [p.running.last_sample_step for p in parts if p.running.is_decoding]
        blocks = [(p.running.row, *new) for p in parts for new in p.new_blocks]
        block_array = np.array(blocks, dtype=np.int32).reshape(-1, 3)
        ids = [
            part.running.prompt.token_ids[
                part.running.num_computed : part.running.num_computed + part.num_tokens
            ]
            for part in prefill
        ]
        batch = MicroBatch(
            step_id=step_id,
            num_decode_rows=len(parts) - len(prefill),
            rows_S=np.array([p.running.row for p in parts], dtype=np.int32),
            first_positions_S=np.array([p.running.num_computed for p in parts], dtype=np.int32),
            num_tokens_S=np.array([p.num_tokens for p in parts], dtype=np.int32),
            samples_S=np.array([part.samples for part in parts]),
            prefill_token_ids=np.array([i for chunk in ids for i in chunk], dtype=np.int32),
            starts=tuple(_row_start(p.running) for p in prefill if p.running.num_computed == 0),
            block_rows=block_array[:, 0],
            block_columns=block_array[:, 1],
            block_ids=block_array[:, 2],
            needs_step=max((step for step in needed if step is not None), default=None),
            late_seqs_L=_late_seqs(parts, late),
            given=_given([p.running for p in parts if p.running.is_decoding]),
        )
        for array in (batch.rows_S, batch.num_tokens_S, batch.prefill_token_ids, block_array):
            array.setflags(write=False)  # as after a way through another process
        return batch

    def _advance(self, step_id: int, parts: list[_Part], late: list[_Part]) -> list[_Running]:
        """Note what the step will have done; returns who samples in it, in order."""
        if late:
            self._late[step_id] = [part.running for part in late]
            self.num_late += len(late)
        samplers = []
        for part in parts:
            part.running.num_computed += part.num_tokens
            if part.running.is_decoding:
                part.running.num_sampled += 1
                part.running.last_sample_step = step_id
                part.running.is_late = part in late
                if part not in late:
                    samplers.append(part.running)
        return samplers

    def _take_output(self, in_flight: dict[int, list[_Running]]) -> None:
        output = self.outputs.get(timeout=PATIENCE_S)
        if isinstance(output, LateOutput):
            assert output.step_id == min(self._late), "late outputs come in the order of steps"
            _take_tokens(self._late.pop(output.step_id), output)
            return
        assert isinstance(output, StepOutput), output
        assert output.step_id == min(in_flight), "outputs come in the order of steps"
        assert len(output.stage_spans) == self.pipeline.facts.num_stages
        self.stage_busy_s += [span.length_s for span in output.stage_spans]
        for scored in output.prompt_logprobs:
            _take_prompt_logprobs(self._scored[scored.seq_id], scored)
        _take_tokens(in_flight.pop(output.step_id), output)


def _late_seqs(parts: list[_Part], late: list[_Part]) -> IntArray | None:
    sampled = [part for part in parts if part.samples]
    seqs = [seq for seq, part in enumerate(sampled) if part in late]
    return np.array(seqs, dtype=np.int32) if seqs else None


def _given(decoding: list[_Running]) -> GivenTokens | None:
    late = [running for running in decoding if running.is_late]
    if not late:
        return None
    return GivenTokens(
        rows_G=np.array([running.row for running in late], dtype=np.int32),
        ids_G=np.array([running.result.token_ids[-1] for running in late], dtype=np.int32),
    )


def _take_tokens(samplers: list[_Running], output: StepOutput | LateOutput) -> None:
    assert len(output.token_ids) == len(samplers)
    for index, running in enumerate(samplers):
        running.result.token_ids.append(int(output.token_ids[index]))
        if output.logprobs is not None:
            _take_logprobs(running, output.logprobs, index)


def _row_start(running: _Running) -> RowStart:
    prompt = running.prompt
    return RowStart(
        row=running.row,
        sampling=prompt.sampling,
        token_ids=np.array(prompt.token_ids, dtype=np.int32),
        num_prompt_tokens=len(prompt.token_ids) - prompt.num_output_tokens,
        seq_id=running.row,
    )


def _take_prompt_logprobs(result: Result, scored: PromptLogprobs) -> None:
    for offset, logprob in enumerate(scored.token_P.tolist()):
        ids, values = scored.top_ids_PK[offset].tolist(), scored.top_PK[offset].tolist()
        place = scored.first + offset
        assert place not in result.prompt_logprobs, f"token {place} is scored twice"
        result.prompt_logprobs[place] = (logprob, dict(zip(ids, values, strict=True)))


def _take_logprobs(running: _Running, logprobs: StepLogprobs, index: int) -> None:
    num_wanted = running.prompt.sampling.num_logprobs
    if num_wanted is None:
        return
    running.result.logprobs.append(float(logprobs.token_S[index]))
    running.result.top_ids.append(logprobs.top_ids_SK[index, :num_wanted].tolist())
    running.result.top_logprobs.append(logprobs.top_SK[index, :num_wanted].tolist())


@cache
def timings_folder() -> tempfile.TemporaryDirectory[str]:
    """Where layer times of this test process are kept: not among the user's own."""
    return tempfile.TemporaryDirectory(prefix="pipeserve-tests-")


@contextmanager
def running_driver(
    path: Path,
    devices: Sequence[str] = ("cpu", "cpu"),
    *,
    slowdowns: Sequence[float] | None = None,
    samples_late: bool | None = None,
    **options: object,
) -> Iterator[Driver]:
    """A driver on a real pipeline for the model at `path`; ends its threads afterwards."""
    defaults = {"kv_cache_bytes": 64 * 1024**2, "max_num_seqs": 16}
    config = Config(**{**defaults, "cache_dir": timings_folder().name, **options})  # type: ignore[arg-type]
    outputs: queue.SimpleQueue[StepOutput | LateOutput | StageFailure] = queue.SimpleQueue()
    with GGUFFile.open(path) as gguf_file:
        pipeline = Pipeline.start(
            gguf_file,
            config,
            devices,
            post=outputs.put,
            on_progress=lambda event: None,
            slowdowns=slowdowns,
            samples_late=samples_late,
        )
    try:
        yield Driver(pipeline, outputs)
    finally:
        assert pipeline.close(timeout_s=PATIENCE_S)
