"""What crosses between engine and pipeline: MicroBatch down; outputs or a StageFailure up.

Shapes: S sequences (rows) in the micro-batch, T tokens, K alternatives per token.
Values only: numpy arrays and plain numbers, so that a message can cross a process boundary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeserve.core.constraint import WordArray
from pipeserve.core.sampling import SamplingParams

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineFacts:
    """What the engine must know of a pipeline before it schedules."""

    num_stages: int
    num_rows: int
    """Row slots: the most sequences that can be running at once."""
    num_blocks: int
    """KV blocks, the minimum over the stages; ids run from 0 to num_blocks - 1."""
    block_size: int
    """Tokens per KV block."""
    context_length: int
    """Most tokens that one sequence may hold, prompt and output together."""
    max_batch_tokens: int
    """Most tokens in one micro-batch."""
    num_look_ahead: int
    """Steps that a cohort may run before the result of its previous step is known (0 or 1)."""
    vocab_size: int
    samples_late: bool = False
    """Whether rows with a chain of samplers may be sampled behind their step, beside the next."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowStart:
    """A sequence takes a row: what the stages keep about it until the row's next RowStart."""

    row: int
    sampling: SamplingParams
    token_ids: IntArray
    """The prompt and, after a preemption, what had been generated: all that will be prefilled, but
    for a beginning whose blocks another row has computed."""
    num_prompt_tokens: int
    """How many of token_ids the client sent; the rest counts as output for the penalties."""
    seq_id: int = 0
    """The sequence's name, for what comes back about its prompt."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepMasks:
    """Which tokens some of a step's sampled rows may have; M such rows, W words of 32 bits."""

    seqs_M: IntArray
    """Which of the sampled rows: from 0 to the number of those with samples_S - 1, ascending."""
    words_MW: WordArray
    """Bit i % 32 of word i // 32 is token i; every row allows at least one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GivenTokens:
    """The newest tokens of G decode rows whose ids the stages do not hold: of late rows."""

    rows_G: IntArray
    ids_G: IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """One step's work for every stage: which rows, which tokens, and what changed.

    Decode rows come first and take one token each, whose id the stages already hold (it was sampled
    there) unless it is given; prefill rows follow and bring their ids along. Stages run micro-
    batches in the order of step_id, so a KV block or a row may be given to a new owner at once: the
    old owner's last writes come before the new owner's first. A full block may stand in the tables
    of several rows; the step that fills it comes before those in which the others read it.
    """

    step_id: int
    """Consecutive from 0."""
    num_decode_rows: int
    rows_S: IntArray
    first_positions_S: IntArray
    """Position of each row's first token in this step: the tokens computed before it."""
    num_tokens_S: IntArray
    """Tokens that each row computes in this step; 1 for decode rows."""
    samples_S: BoolArray
    """Whether a token is sampled after the row's last token: not for a prompt's inner chunks."""
    prefill_token_ids: IntArray
    """Ids of the prefill rows, one row after another."""
    starts: tuple[RowStart, ...]
    """Rows that begin a sequence in this step; applied before anything is computed."""
    block_rows: IntArray
    """New block-table entries: in row block_rows[i], entry block_columns[i] is block_ids[i]."""
    block_columns: IntArray
    block_ids: IntArray
    needs_step: int | None
    """The newest earlier step that sampled a token which a decode row of this one reads."""
    masks: StepMasks | None = None
    """Of the rows that a grammar constrains; None where there are none."""
    late_seqs_L: IntArray | None = None
    """Which of the sampled rows are sampled late: from 0 to the number of those with samples_S - 1,
    ascending. Their tokens come in a LateOutput, and no step reads them before they are given.
    None where there are none."""
    given: GivenTokens | None = None
    """Tokens that came in LateOutputs."""

    @property
    def num_rows(self) -> int:
        return len(self.rows_S)

    @property
    def num_tokens(self) -> int:
        return int(self.num_tokens_S.sum())

    @property
    def sampled_rows(self) -> IntArray:
        return self.rows_S[self.samples_S]

    @property
    def sampled_positions(self) -> IntArray:
        """Where in its sequence each sampled token will stand."""
        return (self.first_positions_S + self.num_tokens_S)[self.samples_S]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepLogprobs:
    """Log-probabilities of the unmodified logits, one line per sampled row of the step.

    K is the largest num_logprobs among the rows; a row that asked for fewer reads a prefix.
    """

    token_S: FloatArray
    """Of the token that was sampled."""
    top_ids_SK: IntArray
    top_SK: FloatArray
    """Of the K likeliest tokens, likeliest first."""

    def without(self, seqs: IntArray) -> StepLogprobs:
        """Of the rows but these."""
        return StepLogprobs(
            token_S=np.delete(self.token_S, seqs),
            top_ids_SK=np.delete(self.top_ids_SK, seqs, axis=0),
            top_SK=np.delete(self.top_SK, seqs, axis=0),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptLogprobs:
    """Log-probabilities of some tokens of a prompt, given those before them; P tokens, K as many
    alternatives as the sequence asked for. A sequence that was preempted sends them again."""

    seq_id: int
    first: int
    """Where in the prompt the first of them stands, at least 1."""
    token_P: FloatArray
    top_ids_PK: IntArray
    top_PK: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A piece of time, by time.monotonic."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepOutput:
    """What came out of one step: a token for every row with samples_S, in the same order, but for
    those that are late."""

    step_id: int
    token_ids: IntArray
    logprobs: StepLogprobs | None
    """None where no row asked for them."""
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    """Of the step's prefill rows that asked for them."""
    stage_spans: tuple[Span, ...]
    """When each stage worked on this step, waiting not counted."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LateOutput:
    """The tokens of a step's late rows, in the order of late_seqs_L. Comes whenever they are there,
    maybe before the step's own output; those of several steps come in order."""

    step_id: int
    token_ids: IntArray
    logprobs: StepLogprobs | None
    """None where no late row asked for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFailure:
    """A stage thread raised and is gone; the pipeline will produce nothing more."""

    stage: int
    error: str
