"""OpenAI response bodies: answers, chunks of streams, the model list and errors.

Runs on the event loop. With requests.py the only place that knows OpenAI's JSON.
"""

from __future__ import annotations

import json
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
    StageFailedError,
    StageStalledError,
    TextTimeoutError,
    UnknownModelError,
)
from pipeserve.server.generation import Delta, ScoredToken
from pipeserve.server.state import ModelCard
from pipeserve.text.tokenizer import Tokenizer

_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say (OpenAI's value for a very unlikely token)."""

RETRY_AFTER_S = 5
"""When to come back to a daemon that loads or drains."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int

    def to_json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedChoice:
    """One choice of an answer that is sent whole."""

    text: str
    scored: Sequence[ScoredToken]
    finish_reason: FinishReason


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

    def __init__(
        self, *, card: ModelCard, tokenizer: Tokenizer, has_logprobs: bool, includes_usage: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._head: Json = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": card.name,
            "system_fingerprint": card.fingerprint,
        }
        chunk = _to_json({"object": self.chunk_name, **self._head})
        self._chunk_start = f'{chunk[:-1]},"choices":['
        self._chunk_end = '],"usage":null}' if includes_usage else "]}"

    @abstractmethod
    def opening(self, index: int) -> str | None:
        """The chunk before a choice's first text, where there is one."""

    def delta(self, index: int, delta: Delta) -> str:
        """The chunk that carries some text."""
        logprobs = _to_json(self._logprobs(delta.scored)) if self._has_logprobs else "null"
        content = self._content(json.dumps(delta.text))
        return (
            f'{self._chunk_start}{{"index":{index},{content},'
            f'"logprobs":{logprobs},"finish_reason":null}}{self._chunk_end}'
        )

    def closing(self, index: int, reason: FinishReason) -> str:
        """The chunk that says why a choice ended."""
        return (
            f'{self._chunk_start}{{"index":{index},{self._no_content},'
            f'"logprobs":null,"finish_reason":"{reason.value}"}}{self._chunk_end}'
        )

    def usage_chunk(self, usage: Usage) -> str:
        """The chunk after all choices that counts the tokens."""
        head = {"object": self.chunk_name, **self._head}
        return _to_json({**head, "choices": [], "usage": usage.to_json()})

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> str:
        """The body of an answer that is not streamed."""
        answer = {
            "object": self.object_name,
            **self._head,
            "choices": [
                {
                    "index": index,
                    **self._whole_content(choice.text),
                    "logprobs": self._logprobs(choice.scored) if self._has_logprobs else None,
                    "finish_reason": choice.finish_reason.value,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage.to_json(),
        }
        return _to_json(answer)

    @abstractmethod
    def _content(self, text_json: str) -> str:
        """The members of a chunk's choice that hold its text, which is JSON already."""

    @abstractmethod
    def _whole_content(self, text: str) -> Json: ...

    @abstractmethod
    def _logprobs(self, scored: Sequence[ScoredToken]) -> Json: ...


class ChatReply(Reply):
    """Answers of /v1/chat/completions."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    _no_content = '"delta":{}'

    def opening(self, index: int) -> str:
        return (
            f'{self._chunk_start}{{"index":{index},"delta":{{"role":"assistant","content":""}},'
            f'"logprobs":null,"finish_reason":null}}{self._chunk_end}'
        )

    def _content(self, text_json: str) -> str:
        return f'"delta":{{"content":{text_json}}}'

    def _whole_content(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, scored: Sequence[ScoredToken]) -> Json:
        return {"content": [self._scored(token) for token in scored], "refusal": None}

    def _scored(self, token: ScoredToken) -> Json:
        pairs = zip(token.logprobs.top_ids, token.logprobs.top_logprobs, strict=True)
        return {
            **self._token(token.token_id, token.logprobs.logprob),
            "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in pairs],
        }

    def _token(self, token_id: int, logprob: float) -> Json:
        raw = self._tokenizer.token_bytes(token_id, skip_special=False)
        return {
            "token": raw.decode(errors="replace"),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(raw),
        }


class CompletionReply(Reply):
    """Answers of /v1/completions."""

    id_prefix = "cmpl"
    object_name = "text_completion"
    chunk_name = "text_completion"
    _no_content = '"text":""'

    def opening(self, index: int) -> None:
        return None

    def _content(self, text_json: str) -> str:
        return f'"text":{text_json}'

    def _whole_content(self, text: str) -> Json:
        return {"text": text}

    def _logprobs(self, scored: Sequence[ScoredToken]) -> Json:
        return {
            "tokens": [self._token(token.token_id) for token in scored],
            "token_logprobs": [max(token.logprobs.logprob, _LEAST_LOGPROB) for token in scored],
            "top_logprobs": [self._top(token) for token in scored],
            "text_offset": [token.text_offset for token in scored],
        }

    def _top(self, token: ScoredToken) -> dict[str, float]:
        """The likeliest tokens; the one that was chosen is always among them."""
        pairs = zip(token.logprobs.top_ids, token.logprobs.top_logprobs, strict=True)
        top = {self._token(token_id): max(value, _LEAST_LOGPROB) for token_id, value in pairs}
        top.setdefault(self._token(token.token_id), max(token.logprobs.logprob, _LEAST_LOGPROB))
        return top

    def _token(self, token_id: int) -> str:
        """Pieces of a character are told apart by their bytes, which this format has no place
        for otherwise (as OpenAI's own answers have them)."""
        raw = self._tokenizer.token_bytes(token_id, skip_special=False)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def model_object(card: ModelCard, context_length: int) -> Json:
    """One model as /v1/models describes it."""
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "pipeserve",
        "max_model_len": context_length,
    }


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
        return _to_json({"error": error})


_SERVER = "server_error"

_ERRORS: tuple[tuple[type[PipeserveError], int, str, str | None], ...] = (
    (UnknownModelError, 404, "invalid_request_error", "model_not_found"),
    (PromptTooLongError, 400, "invalid_request_error", "context_length_exceeded"),
    (ChatTemplateError, 400, "invalid_request_error", "chat_template_error"),
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (RequestError, 400, "invalid_request_error", None),
    (NotReadyError, 503, _SERVER, "not_ready"),
    (TextTimeoutError, 503, _SERVER, "text_timeout"),
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


def _to_json(value: Json) -> str:
    """Compact and in ASCII: some clients split event streams at Unicode line separators."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
