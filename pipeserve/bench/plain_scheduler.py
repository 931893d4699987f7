"""PlainScheduler: how pipelined engines schedule that grew from one device, to compare ours with.

On the engine's thread, or in virtual time. No clock and no torch.
"""

from __future__ import annotations

from dataclasses import replace

from pipeserve.core.batch import PipelineFacts
from pipeserve.engine.policy import AdmissionPolicy
from pipeserve.engine.scheduler import Scheduler
from pipeserve.engine.sequence import Sequence
from pipeserve.engine.step_draft import Chunk, StepDraft


class PlainScheduler(Scheduler):
    """All that can run goes into one micro-batch, up to max_batch_tokens: running sequences in
    their order, then new ones in that of arrival, prompts in chunks. As many micro-batches in
    flight as there are stages, none ahead of its tokens: who was in one together stays together.

    KV for prompt and output is reserved on admission, so that nothing is ever preempted.
    """

    def __init__(self, facts: PipelineFacts, policy: AdmissionPolicy) -> None:
        super().__init__(replace(facts, num_look_ahead=0), policy)

    def _plan(self, draft: StepDraft) -> None:
        space = self.facts.max_batch_tokens
        for sequence in [each for each in self._running if each.num_in_flight == 0]:
            if space > 0:
                space -= self._add(sequence, space, draft)
        while space > 0 and (newcomer := self._next_arrival()) is not None:
            self._running.admit(newcomer, self.prefix_cache.find(newcomer), draft)
            space -= self._add(newcomer, space, draft)

    def _add(self, sequence: Sequence, space: int, draft: StepDraft) -> int:
        """Its next token, or as much of its prompt as there is space for; returns the tokens."""
        if sequence not in self._running.prefilling:
            has_grown = self._running.grow(sequence, draft)
            assert has_grown, "its blocks are reserved"
            draft.decode.append(Chunk(sequence=sequence, num_tokens=1, samples=True))
            return 1
        num_tokens = min(sequence.num_remaining_prefill, space)
        is_last = num_tokens == sequence.num_remaining_prefill
        draft.prefill.append(Chunk(sequence=sequence, num_tokens=num_tokens, samples=is_last))
        if is_last:
            self._running.end_prefill(sequence)
        return num_tokens

    def _next_arrival(self) -> Sequence | None:
        """Who has waited longest, if there is a row and KV for it."""
        sequence = min(self._line, key=lambda each: each.ordinal, default=None)
        if sequence is None or not self._running.has_free_row:
            return None
        num_reserved = sum(map(self._num_blocks_at_end, (*self._running, sequence)))
        return sequence if num_reserved <= self.facts.num_blocks else None

    def _num_blocks_at_end(self, sequence: Sequence) -> int:
        num_tokens = sequence.num_prompt_tokens + sequence.sampling.max_tokens
        return -(-num_tokens // self.facts.block_size)
