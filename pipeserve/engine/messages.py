"""What the front half (HTTP, text) and the engine half (scheduling, stages) say to each other.

Plain immutable values, so that the two halves can live in one process or in two.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path

from pipeserve.config import Config
from pipeserve.core.admission import AdmissionParams
from pipeserve.core.batch import PipelineFacts, PromptLogprobs
from pipeserve.core.constraint import BannedStrings, Grammar
from pipeserve.core.layout import LayoutSurvey
from pipeserve.core.loading import LoadEvent
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.stats import EngineStats
from pipeserve.errors import PipeserveError


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """A stop token was sampled, or the front half found a stop string."""
    LENGTH = "length"
    """max_tokens or the context was reached."""
    ABORT = "abort"
    """The client went away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceMark:
    """On a sequence whose times are to be told: what they belong to."""

    parent: str
    """The request's span, as a W3C traceparent."""
    choice: int
    submitted_s: float
    """By time.monotonic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Front to engine: generate for this prompt."""

    seq_id: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    admission: AdmissionParams = field(default_factory=AdmissionParams)
    grammar: Grammar | None = None
    """What the answer must match."""
    mark: TraceMark | None = None
    """None where nobody wants to know its times."""
    banned: BannedStrings | None = None
    """What it must not hold; not beside a grammar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """Front to engine: the text is complete (a stop string was found); send no more tokens."""

    seq_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Front to engine: nobody waits for this sequence any more; free what it holds."""

    seq_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GetStats:
    """Front to engine: answer with a StatsReply."""

    reply_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SetLogLevel:
    """Front to engine process: log from this level on. An engine in the same process needs none."""

    level: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """Front to engine: abort everything and end the engine thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities of one generated token and of the likeliest tokens in its place."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvents:
    """Engine to front, once per step: one token for each of these sequences, or several in their
    order where they were kept back because they might have been withdrawn.

    The four tuples run in parallel. A finish reason marks the sequence's last token. The token
    that ends a sequence (a stop token) is included.
    """

    seq_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reasons: tuple[FinishReason | None, ...]
    logprobs: tuple[TokenLogprobs | None, ...]
    num_cached_tokens: tuple[tuple[int, int], ...] = ()
    """(sequence, prompt tokens that it had from the prefix cache) where this is its first token
    and there were any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsReply:
    """Engine to front: the answer to GetStats."""

    reply_id: int
    stats: EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFailed:
    """Engine to front, its last word: a stage died or stalled and every sequence is lost."""

    error: str
    stalled: bool
    """True where a stage blocks and its thread may never return."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencesFailed:
    """Router to front: the replica of these sequences is gone; others go on."""

    seq_ids: tuple[int, ...]
    cause: EngineFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicasChanged:
    """Router to front: which replicas are missing."""

    degradation: str | None
    """How many and why, for people; None where all take sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarFailed:
    """Engine to front: this sequence's grammar cannot be followed any further, or what it must not
    hold leaves it nothing to say; it has ended."""

    seq_id: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """A stage's work on the steps of one sequence, other sequences in the same steps included.

    Times by time.monotonic.
    """

    start_s: float
    end_s: float
    busy_s: float
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTimes:
    """Engine to front, once a sequence with a mark has ended: what it spent its time on."""

    mark: TraceMark
    ended_s: float
    prefill: tuple[StageWork, ...] = ()
    """Per stage, until the first token; empty where it never began."""
    decode: tuple[StageWork, ...] = ()
    """Per stage, after the first token; empty where there was no second."""
    replica: int = 0
    """Which one had it; the router knows."""


FrontMessage = Submit | Finish | Abort | GetStats | SetLogLevel | Shutdown
EngineMessage = (
    TokenEvents | PromptLogprobs | StatsReply | GrammarFailed | SequenceTimes | EngineFailed
)
"""Log-probabilities of a prompt come before the sequence's first token."""
RouterMessage = EngineMessage | SequencesFailed | ReplicasChanged


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Front to an engine process, its first word: load this model and start."""

    config: Config
    model_path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyLayouts:
    """Front to an engine process, its only word: which devices are there, and what may they do?"""

    config: Config
    model_path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed:
    """Engine process to front, its last word: the answer to SurveyLayouts."""

    survey: LayoutSurvey


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Engine process to front: the engine runs and takes messages."""

    facts: PipelineFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """Engine process to front, its last word: the model cannot be served, or not surveyed."""

    error: PipeserveError


StartMessage = LoadEvent | Loaded | LoadFailed | Surveyed
"""Engine process to front until the engine runs."""
