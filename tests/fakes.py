"""A pipeline without torch: real paging, row slots, stage order and token hand-back, toy maths.

Each stage keeps token ids where a real one keeps keys and values, so a block that is lost,
shared or overwritten changes the tokens that come out, and `expected_tokens` tells.
"""

from __future__ import annotations

import queue
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeserve.core.batch import (
    LateOutput,
    MicroBatch,
    PipelineFacts,
    PromptLogprobs,
    RowStart,
    Span,
    StageFailure,
    StepLogprobs,
    StepOutput,
)
from pipeserve.core.constraint import WordArray, num_words
from pipeserve.core.sampling import MAX_LOGPROBS, SamplingParams

NextToken = Callable[[Sequence[int], SamplingParams], int]
Pick = Callable[[int, Sequence[int]], int]


def facts(**changes: int) -> PipelineFacts:
    """Small facts for a test, with some of them changed."""
    values = {
        "num_stages": 2,
        "num_rows": 8,
        "num_blocks": 64,
        "block_size": 4,
        "context_length": 128,
        "max_batch_tokens": 32,
        "num_look_ahead": 1,
        "vocab_size": 256,
    }
    return PipelineFacts(**{**values, **changes})


def checksum_token(token_ids: Sequence[int], sampling: SamplingParams) -> int:
    """A token that depends on every id before it and on the seed; a letter, as bytes go."""
    digest = zlib.crc32(np.array(token_ids, np.int64).tobytes(), sampling.seed & 0xFFFFFFFF)
    return ord("a") + digest % 26


def expected_tokens(
    prompt: Sequence[int], sampling: SamplingParams, next_token: NextToken = checksum_token
) -> list[int]:
    """What a faultless pipeline generates for this prompt."""
    token_ids = list(prompt)
    while len(token_ids) - len(prompt) < sampling.max_tokens:
        token_ids.append(next_token(token_ids, sampling))
        if token_ids[-1] in sampling.stop_token_ids:
            break
    return token_ids[len(prompt) :]


@dataclass
class FakeStage:
    """One stage's memory: block tables per row and a token id per KV slot."""

    facts: PipelineFacts
    block_tables: dict[int, dict[int, int]] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)

    def apply(self, batch: MicroBatch) -> None:
        for start in batch.starts:
            self.block_tables[start.row] = {}
        for row, column, block_id in zip(
            batch.block_rows.tolist(),
            batch.block_columns.tolist(),
            batch.block_ids.tolist(),
            strict=True,
        ):
            assert 0 <= block_id < self.facts.num_blocks
            self.block_tables[row][column] = block_id

    def slot(self, row: int, position: int) -> int:
        block_id = self.block_tables[row][position // self.facts.block_size]
        return block_id * self.facts.block_size + position % self.facts.block_size

    def read(self, row: int, length: int) -> list[int]:
        """What the row holds, from position 0."""
        return [self.slots[self.slot(row, position)] for position in range(length)]

    def write(self, row: int, first_position: int, token_ids: Sequence[int]) -> None:
        for offset, token_id in enumerate(token_ids):
            self.slots[self.slot(row, first_position + offset)] = token_id


class FakeStages:
    """The stages of a fake pipeline, run one step at a time by whoever calls `advance`."""

    def __init__(
        self,
        facts: PipelineFacts,
        next_token: NextToken = checksum_token,
        pick: Pick | None = None,
    ) -> None:
        """pick: takes one of the allowed tokens where there is a mask."""
        self.facts = facts
        self._next_token = next_token
        self._pick = pick or take_by_number
        self._stages = [FakeStage(facts) for _ in range(facts.num_stages)]
        self._queues: list[deque[tuple[MicroBatch, list[list[int]]]]] = [
            deque() for _ in self._stages
        ]
        self._token_pool: dict[int, int] = {}
        self._starts: dict[int, RowStart] = {}
        self._late: deque[LateOutput] = deque()
        self._late_tokens: dict[int, int] = {}
        self._last_done = -1
        self._next_step_id = 0

    def submit(self, batch: MicroBatch) -> None:
        check_batch(batch, self.facts)
        assert batch.step_id == self._next_step_id, "step ids are consecutive"
        self._next_step_id += 1
        self._queues[0].append((batch, []))

    @property
    def ready_stages(self) -> list[int]:
        """Stages that can run their next step now."""
        return [
            index
            for index, waiting in enumerate(self._queues)
            if waiting and (index > 0 or self._has_tokens(waiting[0][0]))
        ]

    def _has_tokens(self, batch: MicroBatch) -> bool:
        return batch.needs_step is None or batch.needs_step <= self._last_done

    def advance(self, index: int) -> StepOutput | None:
        """Run one step of one stage; the last stage's steps come out."""
        batch, token_ids_S = self._queues[index].popleft()
        stage = self._stages[index]
        stage.apply(batch)
        if index == 0:
            token_ids_S = self._embed(batch)
        check_masks(batch, self.facts)
        places = list(zip(batch.rows_S.tolist(), batch.first_positions_S.tolist(), strict=True))
        # All read before any writes: what a step computes is there for later steps only.
        pasts = [stage.read(row, first) for row, first in places]
        for (row, first), ids in zip(places, token_ids_S, strict=True):
            stage.write(row, first, ids)
        histories = [[*past, *ids] for past, ids in zip(pasts, token_ids_S, strict=True)]
        if index + 1 < len(self._stages):
            self._queues[index + 1].append((batch, token_ids_S))
            return None
        return self._sample(batch, histories)

    @property
    def num_late(self) -> int:
        """Steps whose late rows can be sampled now."""
        return len(self._late)

    def take_late(self) -> LateOutput:
        """Sample the late rows of the oldest step that has some."""
        return self._late.popleft()

    def _embed(self, batch: MicroBatch) -> list[list[int]]:
        if batch.given is not None:
            given = zip(batch.given.rows_G.tolist(), batch.given.ids_G.tolist(), strict=True)
            for row, token_id in given:
                assert token_id == self._late_tokens.pop(row), "what was sampled is given"
                self._token_pool[row] = token_id
        ids = [[self._token_pool[row]] for row in batch.rows_S[: batch.num_decode_rows].tolist()]
        first = 0
        for count in batch.num_tokens_S[batch.num_decode_rows :].tolist():
            ids.append(batch.prefill_token_ids[first : first + count].tolist())
            first += count
        return ids

    def _sample(self, batch: MicroBatch, histories: list[list[int]]) -> StepOutput:
        for start in batch.starts:
            self._starts[start.row] = start
        token_ids: list[int] = []
        num_logprobs: list[int | None] = []
        rows = batch.rows_S.tolist()
        masks = allowed_tokens(batch)
        for row, samples, history in zip(rows, batch.samples_S, histories, strict=True):
            if samples:
                sampling = self._starts[row].sampling
                token_id = self._next_token(history, sampling)
                if (allowed := masks.get(len(token_ids))) is not None:
                    token_id = self._pick(token_id, allowed)
                token_ids.append(token_id)
                self._token_pool[row] = token_ids[-1]
                num_logprobs.append(sampling.num_logprobs)
        self._last_done = batch.step_id
        late = [] if batch.late_seqs_L is None else batch.late_seqs_L.tolist()
        sampled_rows = batch.sampled_rows.tolist()
        check_late(late, [self._starts[row].sampling for row in sampled_rows], self.facts)
        for seq in late:  # no step may find them before they are given
            self._late_tokens[sampled_rows[seq]] = self._token_pool.pop(sampled_rows[seq])
        if late:
            ids, counts = ([each[seq] for seq in late] for each in (token_ids, num_logprobs))
            self._late.append(
                LateOutput(
                    step_id=batch.step_id,
                    token_ids=np.array(ids, np.int32),
                    logprobs=_logprobs(ids, counts),  # type: ignore[arg-type]
                )
            )
        for seq in reversed(late):
            del token_ids[seq], num_logprobs[seq]
        return StepOutput(
            step_id=batch.step_id,
            token_ids=np.array(token_ids, np.int32),
            logprobs=_logprobs(token_ids, num_logprobs),
            prompt_logprobs=tuple(self._score_prompts(batch)),
            stage_spans=(Span(start_s=1.0, end_s=1.001),) * len(self._stages),
        )

    def _score_prompts(self, batch: MicroBatch) -> Iterator[PromptLogprobs]:
        """A token's score is minus its id, so that a lost or misplaced one shows."""
        for index in range(batch.num_decode_rows, batch.num_rows):
            start = self._starts[int(batch.rows_S[index])]
            first, count = int(batch.first_positions_S[index]), int(batch.num_tokens_S[index])
            scored = start.token_ids[first + 1 : min(first + 1 + count, start.num_prompt_tokens)]
            if start.sampling.num_prompt_logprobs is None or len(scored) == 0:
                continue
            top = np.tile(scored[:, None], (1, start.sampling.num_prompt_logprobs))
            yield PromptLogprobs(
                seq_id=start.seq_id,
                first=first + 1,
                token_P=-scored.astype(np.float32),
                top_ids_PK=top,
                top_PK=-top.astype(np.float32),
            )


def take_by_number(token_id: int, allowed: Sequence[int]) -> int:
    """What a fake pipeline takes where it may not have the token that it would."""
    return allowed[token_id % len(allowed)]


def mask_of(allowed: Iterable[int], vocab_size: int) -> WordArray:
    """The words of a mask that allows these."""
    bits = np.zeros(32 * num_words(vocab_size), np.bool_)
    bits[list(allowed)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def allowed_tokens(batch: MicroBatch) -> dict[int, list[int]]:
    """Of the sampled rows that have masks, by their place among those."""
    if batch.masks is None:
        return {}
    bits = np.unpackbits(batch.masks.words_MW.view(np.uint8), axis=1, bitorder="little")
    rows = zip(batch.masks.seqs_M.tolist(), bits, strict=True)
    return {seq: np.flatnonzero(row).tolist() for seq, row in rows}


def check_masks(batch: MicroBatch, facts: PipelineFacts) -> None:
    for seq, allowed in allowed_tokens(batch).items():
        assert seq < batch.samples_S.sum(), "a mask is for a row that samples"
        assert allowed, "a mask allows something"
        assert allowed[-1] < facts.vocab_size, "a mask allows tokens that exist"


def check_late(late: list[int], sampled: list[SamplingParams], facts: PipelineFacts) -> None:
    """Late are rows with a chain, and where a step has both kinds, all of them."""
    assert facts.samples_late or not late
    chained = [seq for seq, sampling in enumerate(sampled) if sampling.chain is not None]
    if facts.samples_late and (late or len(chained) < len(sampled)):
        assert late == chained


def check_batch(batch: MicroBatch, facts: PipelineFacts) -> None:
    """Assert what every pipeline may rely on."""
    assert 0 < batch.num_tokens <= facts.max_batch_tokens
    assert len(set(batch.rows_S.tolist())) == batch.num_rows
    assert (batch.num_tokens_S[: batch.num_decode_rows] == 1).all()
    assert batch.samples_S[: batch.num_decode_rows].all()
    num_prefill = int(batch.num_tokens_S[batch.num_decode_rows :].sum())
    assert len(batch.prefill_token_ids) == num_prefill
    ends = batch.first_positions_S + batch.num_tokens_S
    assert (ends <= facts.context_length).all()
    assert batch.needs_step is None or batch.needs_step < batch.step_id


def _logprobs(token_ids: list[int], num_logprobs: list[int | None]) -> StepLogprobs | None:
    if all(count is None for count in num_logprobs):
        return None
    size = len(token_ids)
    top_ids = np.array(token_ids, np.int32)[:, None] + np.arange(MAX_LOGPROBS, dtype=np.int32)
    top = -0.5 - np.arange(MAX_LOGPROBS, dtype=np.float32)
    return StepLogprobs(
        token_S=np.full(size, -0.5, np.float32),
        top_ids_SK=top_ids % 256,
        top_SK=np.tile(top, (size, 1)),
    )


class FakePipeline:
    """FakeStages on a thread of their own, with the interface that the engine expects.

    Every step takes `step_s`. Tests may make it fail (`fail_at_step`) or block for ever
    (`block_at_step`; `blocks_late`: late rows alone), have late tokens overtake the step that they
    are of (`late_first`), and may hold it (`gate.clear()`) and let it
    go on (`gate.set()`).
    """

    def __init__(
        self,
        facts: PipelineFacts,
        post: Callable[[StepOutput | LateOutput | StageFailure], None],
        *,
        next_token: NextToken = checksum_token,
        pick: Pick | None = None,
        step_s: float = 0.0,
        fail_at_step: int | None = None,
        block_at_step: int | None = None,
        blocks_late: bool = False,
        late_first: bool = False,
    ) -> None:
        self.facts = facts
        self._post = post
        self._stages = FakeStages(facts, next_token, pick)
        self._step_s = step_s
        self._fail_at_step = fail_at_step
        self._block_at_step = block_at_step
        self._blocks_late = blocks_late
        self._late_first = late_first
        self.gate = threading.Event()
        self.gate.set()
        self._inbox: queue.SimpleQueue[MicroBatch | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fake pipeline", daemon=True)
        self._thread.start()

    def submit(self, batch: MicroBatch) -> None:
        self._inbox.put(batch)

    def describe_stall(self) -> str:
        return "stage 0 is busy with a step"

    def close(self, timeout_s: float) -> bool:
        self.gate.set()
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (batch := self._inbox.get()) is not None:
            self.gate.wait()
            if batch.step_id == self._fail_at_step:
                self._post(StageFailure(stage=0, error="RuntimeError: told to fail"))
                return
            if batch.step_id == self._block_at_step:
                threading.Event().wait()
            if self._step_s:
                time.sleep(self._step_s)
            self._stages.submit(batch)
            for index in range(self.facts.num_stages):
                output = self._stages.advance(index)
            assert output is not None
            outputs: list[StepOutput | LateOutput] = [output]
            while self._stages.num_late and not self._blocks_late:
                outputs.append(self._stages.take_late())
            for each in reversed(outputs) if self._late_first else outputs:
                self._post(each)
