"""OpenAI response bodies: what all answers share, the model list and errors.

Runs on the event loop.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeserve.engine.messages import FinishReason
from pipeserve.errors import (
    ChatTemplateError,
    NotReadyError,
    PipeserveError,
    PromptTooLongError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
    StageFailedError,
    StageStalledError,
    TextTimeoutError,
    UnauthorizedError,
    UnknownModelError,
)
from pipeserve.server.generation import Choice, Delta
from pipeserve.server.json_pieces import to_json
from pipeserve.server.plan import Plan
from pipeserve.server.scores import ScoredToken
from pipeserve.server.state import ModelCard, Services
from pipeserve.text.answer import AnswerParts
from pipeserve.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say (OpenAI's value for a very unlikely token)."""

RETRY_AFTER_S = 5
"""When to come back to a daemon that loads or drains."""

Json = dict[str, Any]
ScoreColumns = tuple[str, ...]
"""Some tokens in the lists of an answer's logprobs: of each list the items, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Those among prompt_tokens that were not computed, but found in the prefix cache."""
    reasoning_tokens: int = 0
    """Those among completion_tokens that were thoughts."""

    def to_json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedChoice:
    """One choice of an answer that is sent whole."""

    choice: Choice
    parts: AnswerParts
    """All deltas in one."""
    scores: Sequence[ScoreColumns] = ()
    """Of all tokens, in turn."""


class Reply(ABC):
    """The JSON of one answer: whole, or as the chunks of a stream.

    What is the same in all chunks is serialised once; a chunk without log-probabilities only
    escapes its text.
    """

    id_prefix: str
    object_name: str
    chunk_name: str
    _no_content: str
    """The members of a chunk's choice where there is no text."""
    _score_names: tuple[str, ...]
    """The lists in logprobs."""
    _score_end: str = ""
    """What follows them there, as JSON."""

    def __init__(self, *, card: ModelCard, tokenizer: Tokenizer, plan: Plan) -> None:
        self._tokenizer = tokenizer
        self._plan = plan
        self._head: Json = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": card.name,
            "system_fingerprint": card.fingerprint,
        }
        chunk = to_json({"object": self.chunk_name, **self._head})
        self._chunk_start = f'{chunk[:-1]},"choices":['
        self._plain_end = '],"usage":null}' if plan.includes_usage else "]}"

    @abstractmethod
    def opening(self, index: int) -> str | None:
        """The chunk before a choice's first text, where there is one."""

    def delta(self, index: int, delta: Delta) -> str:
        """The chunk that carries some text."""
        has_logprobs = self._plan.has_logprobs
        logprobs = self._logprobs([self.score(delta.scored)]) if has_logprobs else "null"
        return (
            f'{self._chunk_start}{{"index":{index},{self._content(delta.parts)},'
            f'"logprobs":{logprobs},"finish_reason":null}}{self._end(index, delta.num_tokens)}'
        )

    def closing(self, choice: Choice) -> str:
        """The chunk that says why a choice ended."""
        return (
            f'{self._chunk_start}{{"index":{choice.index},{self._no_content},"logprobs":null,'
            f'"finish_reason":"{_reason(choice)}"}}{self._end(choice.index, choice.num_tokens)}'
        )

    def _end(self, index: int, num_tokens: int) -> str:
        """Of a chunk of a choice that has so many tokens."""
        if not self._plan.counts_every_chunk:
            return self._plain_end
        prompt_tokens = len(self._plan.sequences[index].prompt_token_ids)
        usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=num_tokens)
        return f'],"usage":{to_json(usage.to_json())}}}'

    def usage_chunk(self, usage: Usage) -> str:
        """The chunk after all choices that counts the tokens."""
        head = {"object": self.chunk_name, **self._head}
        return to_json({**head, "choices": [], "usage": usage.to_json()})

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> list[str]:
        """The body of an answer that is not streamed, in pieces."""
        head = to_json({"object": self.object_name, **self._head})
        pieces = [f'{head[:-1]},"choices":[']
        for number, finished in enumerate(choices):
            content = to_json(
                {"index": finished.choice.index, **self._whole_content(finished.parts)}
            )
            pieces.append(f'{"," if number else ""}{content[:-1]},"logprobs":')
            pieces += (
                self._logprobs_pieces(finished.scores) if self._plan.has_logprobs else ["null"]
            )
            pieces.append(f',"finish_reason":"{_reason(finished.choice)}"}}')
        pieces.append(f'],"usage":{to_json(usage.to_json())}}}')
        return pieces

    def score(self, scored: Sequence[ScoredToken]) -> ScoreColumns:
        """What stands in the lists of logprobs for these tokens."""
        rows = [self._score(token) for token in scored]
        return tuple(to_json(column)[1:-1] for column in zip(*rows, strict=True))

    def _logprobs(self, scores: Sequence[ScoreColumns]) -> str:
        return "".join(self._logprobs_pieces(scores))

    def _logprobs_pieces(self, scores: Sequence[ScoreColumns]) -> list[str]:
        scores = [columns for columns in scores if columns]
        pieces = []
        for column, name in enumerate(self._score_names):
            pieces.append(f'{"," if column else "{"}"{name}":[')
            for number, columns in enumerate(scores):
                pieces += [",", columns[column]] if number else [columns[column]]
            pieces.append("]")
        pieces.append(f"{self._score_end}}}")
        return pieces

    @abstractmethod
    def _content(self, parts: AnswerParts) -> str:
        """The members of a chunk's choice that hold these parts, as JSON."""

    @abstractmethod
    def _whole_content(self, parts: AnswerParts) -> Json: ...

    @abstractmethod
    def _score(self, token: ScoredToken) -> tuple[Any, ...]:
        """Its value in each of the lists of logprobs."""


def _reason(choice: Choice) -> str:
    """Why the choice ended, in OpenAI's words."""
    reason = choice.finish_reason
    assert reason is not None, "the choice has ended"
    return "tool_calls" if choice.has_calls and reason is FinishReason.STOP else reason.value


def model_object(services: Services) -> Json:
    """The model as /v1/models describes it."""
    card = services.card
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "pipeserve",
        "max_model_len": services.engine.facts.context_length,
        "meta": _model_meta(services),
    }


def _model_meta(services: Services) -> Json:
    """Numbers under llama-server's names where it has them."""
    features, facts = services.chat_template.features, services.card.facts
    meta: Json = {
        "n_vocab": services.tokenizer.vocab_size,
        "capabilities": {
            "tools": features.tools,
            "tool_call_format": features.tool_call_format.name,
            "reasoning": features.reasoning is not None,
            "thinking_switch": features.thinking_switch,
            "infill": services.tokenizer.infill is not None,
        },
    }
    if facts is not None:
        meta |= {
            "architecture": facts.architecture,
            "quantisation": facts.quantisation,
            "n_params": facts.num_parameters,
            "size": facts.num_bytes,
            "n_ctx_train": facts.trained_context,
        }
    return meta


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReply:
    """An error as the client gets it."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return to_json({"error": error})


_SERVER = "server_error"

_ERRORS: tuple[tuple[type[PipeserveError], int, str, str | None], ...] = (
    (UnknownModelError, 404, "invalid_request_error", "model_not_found"),
    (PromptTooLongError, 400, "invalid_request_error", "context_length_exceeded"),
    (UnauthorizedError, 401, "authentication_error", "invalid_api_key"),
    (ChatTemplateError, 400, "invalid_request_error", "chat_template_error"),
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (RequestError, 400, "invalid_request_error", None),
    (NotReadyError, 503, _SERVER, "not_ready"),
    (TextTimeoutError, 503, _SERVER, "text_timeout"),
    (RequestTimeoutError, 504, _SERVER, "request_timeout"),
    (StageStalledError, 500, _SERVER, "stage_stalled"),
    (StageFailedError, 500, _SERVER, "stage_failed"),
    (PipeserveError, 500, _SERVER, None),
)
"""Status, type and code per class of error; the first that fits counts."""


def describe_error(error: PipeserveError) -> ErrorReply:
    """How a client hears of one of our own errors."""
    status, kind, code = next(row[1:] for row in _ERRORS if isinstance(error, row[0]))
    headers: dict[str, str] = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(error.retry_after_s)
    elif status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    elif status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return ErrorReply(
        status=status,
        message=str(error),
        kind=kind,
        param=error.param if isinstance(error, RequestError) else None,
        code=code,
        headers=headers,
    )
