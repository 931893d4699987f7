"""StepDraft: a micro-batch while the scheduler puts it together.

Owned by the engine thread and by one call of the scheduler. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pipeserve.core.batch import GivenTokens, IntArray, MicroBatch, RowStart, StepMasks
from pipeserve.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What one sequence computes in one step."""

    sequence: Sequence
    num_tokens: int
    samples: bool


@dataclass(slots=True, eq=False)
class StepDraft:
    """Decode chunks, prefill chunks, and what has changed in rows and block tables."""

    decode: list[Chunk] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)
    starts: list[RowStart] = field(default_factory=list)
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)
    """(row, column of the row's block table, block id)."""
    late: set[Sequence] = field(default_factory=set)
    """Of those that sample, who does so behind the step."""

    @property
    def chunks(self) -> list[Chunk]:
        """In the order of the micro-batch's rows."""
        return self.decode + self.prefill

    @property
    def sampling(self) -> list[Sequence]:
        """Those that sample, in the order of the micro-batch's rows."""
        return [chunk.sequence for chunk in self.chunks if chunk.samples]

    def add_start(self, sequence: Sequence) -> None:
        """A sequence begins in its row with this step."""
        assert sequence.row is not None, "a sequence that starts has a row"
        self.starts.append(
            RowStart(
                row=sequence.row,
                sampling=sequence.sampling,
                token_ids=np.array(sequence.token_ids, np.int32),
                num_prompt_tokens=sequence.num_prompt_tokens,
                seq_id=sequence.seq_id,
            )
        )

    def add_restart(self, sequence: Sequence) -> None:
        """A running sequence begins anew in its row, with the blocks that it has."""
        assert sequence.row is not None, "a running sequence has a row"
        self.add_start(sequence)
        for column, block_id in enumerate(sequence.block_table):
            self.new_blocks.append((sequence.row, column, block_id))

    def append_blocks(self, sequence: Sequence, block_ids: Iterable[int]) -> None:
        """A running sequence holds these blocks from now on."""
        assert sequence.row is not None, "a sequence that grows has a row"
        for block_id in block_ids:
            self.new_blocks.append((sequence.row, len(sequence.block_table), block_id))
            sequence.block_table.append(block_id)

    def build(self, step_id: int) -> MicroBatch:
        """The message to the stages."""
        chunks, sampling = self.chunks, self.sampling
        prefill_ids: list[int] = []
        for chunk in self.prefill:
            first = chunk.sequence.num_computed_tokens
            prefill_ids += chunk.sequence.token_ids[first : first + chunk.num_tokens]
        awaited = [
            chunk.sequence.last_sample_step
            for chunk in self.decode
            if chunk.sequence.last_sample_step is not None
        ]
        blocks = np.array(self.new_blocks, np.int32).reshape(-1, 3)
        return MicroBatch(
            step_id=step_id,
            num_decode_rows=len(self.decode),
            rows_S=np.array([chunk.sequence.row for chunk in chunks], np.int32),
            first_positions_S=np.array([c.sequence.num_computed_tokens for c in chunks], np.int32),
            num_tokens_S=np.array([chunk.num_tokens for chunk in chunks], np.int32),
            samples_S=np.array([chunk.samples for chunk in chunks], np.bool_),
            prefill_token_ids=np.array(prefill_ids, np.int32),
            starts=tuple(self.starts),
            block_rows=blocks[:, 0],
            block_columns=blocks[:, 1],
            block_ids=blocks[:, 2],
            needs_step=max(awaited, default=None),
            masks=_masks(sampling),
            late_seqs_L=_late_seqs(sampling, self.late),
            given=_given([chunk.sequence for chunk in self.decode if chunk.sequence.is_late]),
        )


def _late_seqs(sampling: list[Sequence], late: set[Sequence]) -> IntArray | None:
    if not late:
        return None
    return np.array([at for at, sequence in enumerate(sampling) if sequence in late], np.int32)


def _given(sequences: list[Sequence]) -> GivenTokens | None:
    """Sequences whose newest token was sampled late and is known."""
    if not sequences:
        return None
    assert all(sequence.num_in_flight == 0 for sequence in sequences), "a given token is known"
    return GivenTokens(
        rows_G=np.array([sequence.row for sequence in sequences], np.int32),
        ids_G=np.array([sequence.token_ids[-1] for sequence in sequences], np.int32),
    )


def _masks(sampled: list[Sequence]) -> StepMasks | None:
    masks = [(at, mask) for at, s in enumerate(sampled) if (mask := s.next_mask) is not None]
    if not masks:
        return None
    return StepMasks(
        seqs_M=np.array([at for at, _ in masks], np.int32),
        words_MW=np.stack([mask_W for _, mask_W in masks]),
    )
