"""Sequence: one prompt and what is generated for it, and the table of its legal transitions.

Owned by the engine thread. Knows neither text nor HTTP nor tensors.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from pipeserve.core.admission import AdmissionParams
from pipeserve.core.constraint import WordArray
from pipeserve.core.sampling import SamplingParams


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    """Holds nothing; its tokens must be computed (again, after a preemption)."""
    RUNNING = "running"
    """Holds a row and KV blocks."""
    FINISHED = "finished"
    """Ended by a stop token, a stop string or its length."""
    ABORTED = "aborted"
    """Ended because nobody waits for it."""


TRANSITIONS: dict[SequenceStatus, frozenset[SequenceStatus]] = {
    SequenceStatus.WAITING: frozenset(
        # A stop string may be found, or the client go away, while a preempted sequence waits.
        {SequenceStatus.RUNNING, SequenceStatus.FINISHED, SequenceStatus.ABORTED}
    ),
    SequenceStatus.RUNNING: frozenset(
        {SequenceStatus.WAITING, SequenceStatus.FINISHED, SequenceStatus.ABORTED}
    ),
    SequenceStatus.FINISHED: frozenset(),
    SequenceStatus.ABORTED: frozenset(),
}


class IllegalTransitionError(AssertionError):
    """A sequence was told to do what its state forbids; nothing was changed."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One prompt and what is generated for it.

    `token_ids` holds what is known: the prompt and the tokens whose step has come back. Up to
    `num_in_flight` further tokens have been sampled on the device and are on their way.
    """

    seq_id: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    admission: AdmissionParams = field(default_factory=AdmissionParams)
    is_constrained: bool = False
    """Whether a grammar says what may come next."""
    mask_W: WordArray | None = None
    """Of a constrained one: the tokens that may come next; None until that is known."""
    token_ids: list[int] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    row: int | None = None
    """Row slot on every stage while RUNNING."""
    ordinal: int = 0
    """Of its arrival; kept through preemptions."""
    arrival_s: float = 0.0
    """When it arrived, by the clock that the scheduler is told."""
    cohort: int | None = None
    """The cohort it decodes with; set at its first decode."""
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Names of its first full blocks, as far as anyone asked."""
    num_named_blocks: int = 0
    """Of its block table, from the first on: found in the prefix cache or named there."""
    num_cached_tokens: int | None = None
    """Prompt tokens that it did not compute at its first admission; None before."""
    num_computed_tokens: int = 0
    """Tokens whose KV has been computed or is being computed by a submitted step, whether its own
    or another sequence's."""
    num_in_flight: int = 0
    """Tokens sampled by submitted steps whose result is not known yet."""
    last_sample_step: int | None = None
    """The newest step that samples for this sequence."""
    generation: int = 0
    """Counts the times it gave up its row: results of an earlier generation are dropped."""
    num_prefill_tokens: int = 0
    """Known tokens when it was admitted: decoding begins once they are computed."""

    def __post_init__(self) -> None:
        assert self.prompt_token_ids, "a prompt has at least one token"
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens that are known."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_remaining_prefill(self) -> int:
        """Tokens still to be computed before the first (or next) token can be sampled."""
        return max(0, self.num_prefill_tokens - self.num_computed_tokens)

    @property
    def is_decoding(self) -> bool:
        """Prefilled as far as submitted steps go: its next step takes one token."""
        return self.status is SequenceStatus.RUNNING and self.num_remaining_prefill == 0

    @property
    def wants_token(self) -> bool:
        """Whether max_tokens allows one more beyond those known and in flight."""
        return self.num_output_tokens + self.num_in_flight < self.sampling.max_tokens

    @property
    def awaits_mask(self) -> bool:
        """Whether its next token cannot be sampled before a mask has come."""
        return self.is_constrained and self.mask_W is None

    @property
    def is_ended(self) -> bool:
        return not TRANSITIONS[self.status]

    def move_to(self, status: SequenceStatus) -> None:
        """Change the state as TRANSITIONS allows.

        Raises:
            IllegalTransitionError: the table has no such step; the sequence is unchanged.
        """
        if status not in TRANSITIONS[self.status]:
            raise IllegalTransitionError(
                f"sequence {self.seq_id} cannot go from {self.status.value} to {status.value}"
            )
        self.status = status

    def start(self, row: int, *, num_computed_tokens: int) -> None:
        """WAITING -> RUNNING: take a row and compute the known tokens but for the first ones."""
        assert num_computed_tokens < len(self.token_ids), "the last known token is always computed"
        self.move_to(SequenceStatus.RUNNING)
        self.row = row
        self.num_computed_tokens = num_computed_tokens
        self.num_prefill_tokens = len(self.token_ids)

    def release(self, status: SequenceStatus) -> None:
        """RUNNING or WAITING -> `status`: forget row, blocks and whatever is in flight.

        The caller has given row and blocks back.
        """
        self.move_to(status)
        self.row = None
        self.cohort = None
        self.block_table = []
        self.num_named_blocks = 0
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.last_sample_step = None
        self.num_prefill_tokens = 0
        self.generation += 1
