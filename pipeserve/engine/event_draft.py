"""EventDraft: what came out of one step, while the scheduler looks at its tokens one by one.

Owned by the engine thread and by one call of the scheduler. Decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeserve.core.batch import StepLogprobs
from pipeserve.engine.messages import FinishReason, TokenEvents, TokenLogprobs
from pipeserve.engine.sequence import Sequence
from pipeserve.engine.watched_output import OutputToken


@dataclass(slots=True, eq=False)
class EventDraft:
    """The columns of TokenEvents."""

    logprobs_of_step: StepLogprobs | None
    seq_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reasons: list[FinishReason | None] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    num_cached_tokens: list[tuple[int, int]] = field(default_factory=list)

    def add(self, sequence: Sequence, token_id: int, reason: FinishReason | None, at: int) -> None:
        """A token of a sequence; `at` is its row in the step's log-probabilities."""
        if sequence.watched is not None:
            self._add_watched(sequence, reason)
            return
        if sequence.num_output_tokens == 1:
            self._note_cached(sequence)
        self.seq_ids.append(sequence.seq_id)
        self.token_ids.append(token_id)
        self.finish_reasons.append(reason)
        self.logprobs.append(self._logprobs(sequence, at))

    def token(self, sequence: Sequence, token_id: int, at: int) -> OutputToken:
        """For those that are not told at once."""
        return OutputToken(token_id=token_id, logprobs=self._logprobs(sequence, at))

    def _add_watched(self, sequence: Sequence, reason: FinishReason | None) -> None:
        """Whatever of its tokens cannot be withdrawn any more."""
        watched = sequence.watched
        assert watched is not None, "a watched sequence"
        if not watched.has_told:
            self._note_cached(sequence)
        told = watched.tell(is_last=reason is not None)
        for token in told:
            self.seq_ids.append(sequence.seq_id)
            self.token_ids.append(token.token_id)
            self.finish_reasons.append(reason if token is told[-1] else None)
            self.logprobs.append(token.logprobs)

    def _note_cached(self, sequence: Sequence) -> None:
        if sequence.num_cached_tokens:
            self.num_cached_tokens.append((sequence.seq_id, sequence.num_cached_tokens))

    def build(self) -> TokenEvents:
        """The message to the front half."""
        return TokenEvents(
            seq_ids=tuple(self.seq_ids),
            token_ids=tuple(self.token_ids),
            finish_reasons=tuple(self.finish_reasons),
            logprobs=tuple(self.logprobs),
            num_cached_tokens=tuple(self.num_cached_tokens),
        )

    def _logprobs(self, sequence: Sequence, at: int) -> TokenLogprobs | None:
        count = sequence.sampling.num_logprobs
        if count is None:
            return None
        step = self.logprobs_of_step
        assert step is not None, "a row that asks for log-probabilities gets them"
        return TokenLogprobs(
            logprob=float(step.token_S[at]),
            top_ids=tuple(step.top_ids_SK[at, :count].tolist()),
            top_logprobs=tuple(step.top_SK[at, :count].tolist()),
        )
