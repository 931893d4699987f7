"""Sequence: one prompt and what is generated for it, and the table of its legal transitions.

Owned by the engine thread. Knows neither text nor HTTP nor tensors.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from pipeserve.core.admission import AdmissionParams
from pipeserve.core.constraint import FreeRun, WordArray
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.watched_output import WatchedOutput


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
    free_run: FreeRun | None = None
    """Of a constrained one: instead of a mask, that none is needed for a while."""
    free_from: int = 0
    """Of a free run: how many tokens were known when it began."""
    is_rewound: bool = False
    """Whether its newest token is to be computed again, in the row that it has."""
    is_watched: bool = False
    """Whether its text must not hold certain strings."""
    watched: WatchedOutput | None = None
    """Of a watched one; None before its watch is there."""
    has_begun: bool = False
    """Whether a token was ever known."""
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
    is_late: bool = False
    """Whether that one samples late, so that the first stage does not have its token."""
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
    def has_chain(self) -> bool:
        """Whether its tokens are drawn by a chain of samplers, which takes long."""
        return self.sampling.chain is not None

    @property
    def wants_token(self) -> bool:
        """Whether max_tokens allows one more beyond those known and in flight."""
        return self.num_output_tokens + self.num_in_flight < self.sampling.max_tokens

    @property
    def is_masked(self) -> bool:
        """Whether every token of it needs a mask, so that none can be looked ahead."""
        return self.is_constrained and self.free_run is None

    @property
    def awaits_mask(self) -> bool:
        """Whether its next token cannot be sampled before a mask has come."""
        return self.is_masked and self.mask_W is None

    @property
    def may_run_on(self) -> bool:
        """Whether nothing that is known or in flight holds up one more token."""
        run = self.free_run
        if run is None or run.max_tokens is None:
            return self.wants_token and not self.awaits_mask
        num_free = len(self.token_ids) + self.num_in_flight - self.free_from
        return self.wants_token and num_free < run.max_tokens

    @property
    def is_unready(self) -> bool:
        """Whether it need not take a row yet."""
        return self.awaits_mask or (self.is_watched and self.watched is None)

    @property
    def next_mask(self) -> WordArray | None:
        """What the token of its next step may be; None: any."""
        if self.watched is not None:
            return self.watched.mask_at(self.num_output_tokens + self.num_in_flight)
        return self.mask_W

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
        self.is_rewound = False
        self.num_computed_tokens = num_computed_tokens
        self.num_prefill_tokens = len(self.token_ids)

    def allow(self, allowed: WordArray | FreeRun) -> None:
        """What the next token of a constrained one may be."""
        assert self.awaits_mask and self.num_in_flight == 0, "a mask holds for one token"
        if isinstance(allowed, FreeRun):
            self.free_run, self.free_from = allowed, len(self.token_ids)
        else:
            self.mask_W = allowed

    def take_constrained(self) -> tuple[int, ...]:
        """Its newest tokens, if what may follow them has to be found out now; else none."""
        run = self.free_run
        if run is None:
            self.mask_W = None
            return (self.token_ids[-1],)
        num_free = len(self.token_ids) - self.free_from
        if self.token_ids[-1] not in run.watched and num_free != run.max_tokens:
            return ()
        self.free_run = None
        return tuple(self.token_ids[self.free_from :])

    def rewind(self) -> None:
        """Forget what is in flight; row and blocks stay. The newest token is computed once more,
        so that the one after it is sampled anew."""
        self.num_computed_tokens = len(self.token_ids) - 1
        self.num_prefill_tokens = len(self.token_ids)
        self.num_in_flight = 0
        self.last_sample_step = None
        self.is_late = False
        self.is_rewound = True
        self.generation += 1

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
        self.is_late = False
        self.num_prefill_tokens = 0
        self.generation += 1

    def cut_back(
        self, num_tokens: int, num_whole: int, block_ids: list[int], *, block_size: int
    ) -> None:
        """While RUNNING: as withdraw; the first num_whole blocks stay, then come block_ids."""
        assert self.status is SequenceStatus.RUNNING, "it keeps its row"
        self._drop_last(num_tokens, block_size)
        self.block_table[num_whole:] = block_ids
        self.num_named_blocks = min(self.num_named_blocks, num_whole)
        self.rewind()
        self.num_computed_tokens = num_whole * block_size

    def withdraw(self, num_tokens: int, *, block_size: int) -> None:
        """While WAITING: the last known tokens were never generated."""
        assert self.status is SequenceStatus.WAITING, "it is computed anew from there"
        self._drop_last(num_tokens, block_size)

    def _drop_last(self, num_tokens: int, block_size: int) -> None:
        assert num_tokens <= self.num_output_tokens, "the prompt stays"
        del self.token_ids[len(self.token_ids) - num_tokens :]
        del self.block_hashes[len(self.token_ids) // block_size :]
