"""LateSampler: rows with a chain of samplers apart from the others, behind the step or in it.

Runs on the last stage's thread, and what is late on a LateThread. Each of the two kinds of rows has
a sampler and with it a state of its own, so that nothing is shared between the threads' streams.

Shapes: S sampled rows of a step, L late ones of them, R row slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeserve.core.batch import IntArray, LateOutput, MicroBatch, RowStart, StepMasks
from pipeserve.core.sampling import SamplingParams
from pipeserve.runtime.devices import int_tensor
from pipeserve.runtime.late_thread import LateThread
from pipeserve.runtime.sampled import Drawn, to_host
from pipeserve.runtime.sampler import Sampler

_NOTHING = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
"""Of a row that is the other sampler's: the cheapest to draw, if it is drawn at all."""


class LateSampler:
    """A token for every row as a Sampler's, whichever way it is drawn.

    Memory on the device: that of two Samplers, and the logits of late rows until they are drawn.
    """

    def __init__(self, *, make_sampler: Callable[[], Sampler], thread: LateThread) -> None:
        self._plain, self._chained = make_sampler(), make_sampler()
        self._thread = thread
        self._chained_rows: set[int] = set()
        self._starts: list[RowStart] = []
        """Of which _chained does not know yet."""
        self._was_chained = False
        """Whether a row with a chain ever started: until then _chained need not know of any."""

    def start(self, start: RowStart) -> None:
        """A sequence takes a row."""
        other = replace(start, sampling=_NOTHING)
        has_chain = start.sampling.chain is not None
        self._plain.start(other if has_chain else start)
        self._was_chained |= has_chain
        if has_chain:
            self._chained_rows.add(start.row)
        else:
            self._chained_rows.discard(start.row)
        if self._was_chained:
            self._starts.append(start if has_chain else other)

    def sample_step(self, logits_SV: Tensor, batch: MicroBatch) -> Drawn:
        """As a Sampler's, but that the ids of late rows mean nothing. Where none is late, all rows
        have a chain or none has."""
        if batch.late_seqs_L is not None:
            return self._sample_late(logits_SV, batch, batch.late_seqs_L)
        num_chained = 0
        if self._chained_rows:
            num_chained = len(self._chained_rows.intersection(batch.sampled_rows.tolist()))
        if num_chained > 0:
            assert num_chained == len(logits_SV), "a chain holds up no row without one"
            return self._sample_chained(logits_SV, batch)
        if starts := self._take_starts():
            self._thread.add(lambda: self._start_chained(starts))
        return self._plain.sample_step(logits_SV, batch)

    def _sample_chained(self, logits_SV: Tensor, batch: MicroBatch) -> Drawn:
        """In the step: nobody else waits for it."""
        drawn: list[Drawn] = []

        def work() -> None:
            self._start_chained(self._take_starts())
            drawn.append(self._chained.sample_step(logits_SV, batch))

        self._thread.do_at_once(work)
        return drawn[0]

    def _sample_late(self, logits_SV: Tensor, batch: MicroBatch, late_L: IntArray) -> Drawn:
        rows_S, positions_S = batch.sampled_rows, batch.sampled_positions
        in_step, late = _split(batch.masks, late_L)
        if len(late_L) < len(rows_S):
            drawn = self._plain.sample(logits_SV, rows_S, positions_S, in_step)
        else:
            ids_S = torch.zeros(len(rows_S), dtype=torch.int64, device=logits_SV.device)
            drawn = Drawn(ids_S=ids_S, logprobs=None)
        # A copy: the next step writes over the logits.
        late_LV = logits_SV.index_select(0, int_tensor(late_L, logits_SV.device))
        starts, rows_L, positions_L = self._take_starts(), rows_S[late_L], positions_S[late_L]
        step_id = batch.step_id

        def work() -> LateOutput:
            self._start_chained(starts)
            sampled = to_host(self._chained.sample(late_LV, rows_L, positions_L, late))
            # Waits: so long the logits must not be freed, which are memory of the stage's stream.
            token_ids = sampled.token_ids()
            return LateOutput(
                step_id=step_id, token_ids=token_ids, logprobs=sampled.step_logprobs()
            )

        self._thread.add(work)
        return drawn

    def _take_starts(self) -> list[RowStart]:
        taken, self._starts = self._starts, []
        return taken

    def _start_chained(self, starts: list[RowStart]) -> None:
        for start in starts:
            self._chained.start(start)


def _split(masks: StepMasks | None, late_L: IntArray) -> tuple[StepMasks | None, StepMasks | None]:
    """Those of the rows in the step; and of the late ones, counted among these."""
    if masks is None:
        return None, None
    is_late_M = np.isin(masks.seqs_M, late_L)
    late_M = np.searchsorted(late_L, masks.seqs_M[is_late_M]).astype(np.int32)
    return (
        _some(masks.seqs_M[~is_late_M], masks.words_MW[~is_late_M]),
        _some(late_M, masks.words_MW[is_late_M]),
    )


def _some(seqs_M: IntArray, words_MW: IntArray) -> StepMasks | None:
    return StepMasks(seqs_M=seqs_M, words_MW=words_MW) if len(seqs_M) else None
