"""Every error that pipeserve raises for something outside its own code.

All survive pickling: the engine half may be another process.

PipeserveError
├── ConfigError                  an option is unknown, malformed or contradicts another
├── HubError                     a model cannot be found, fetched or verified
├── ModelError                   the model file cannot be served
│   ├── GGUFFormatError          not a GGUF file, or a truncated or inconsistent one
│   ├── MissingTensorError       the architecture needs a tensor that the file lacks
│   ├── UnsupportedModelError    an architecture, quantisation or tokenizer that is not built in
│   └── VocabularyMismatchError  tokenizer and embedding disagree about the vocabulary
├── RequestError                 the client asked for something that cannot be done (HTTP 4xx)
│   ├── InvalidParameterError    one field has a wrong value
│   ├── PromptTooLongError       prompt and output do not fit the context
│   ├── UnknownModelError        the request names a model that is not served
│   ├── UnauthorizedError        no API key, or one that is not known (401)
│   ├── ChatTemplateError        the model's chat template refused the messages
│   ├── GrammarError             a schema or grammar cannot be honoured
│   └── QueueFullError           too many requests wait (429); says when to come back
└── EngineError                  serving itself failed (HTTP 5xx)
    ├── NotReadyError            loading, restarting or draining (503)
    ├── TextTimeoutError         parsing, templating or tokenising took too long (503)
    ├── RequestTimeoutError      the answer took longer than the request allows (504)
    ├── StageFailedError         a stage thread raised, or the engine process died
    └── StageStalledError        a stage or the engine made no progress for stage_timeout_s
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any


class PipeserveError(Exception):
    """Root of the tree: its text is meant for the person who can mend the cause."""


class ConfigError(PipeserveError):
    """An option is unknown, malformed or contradicts another."""


class HubError(PipeserveError):
    """A model cannot be found, fetched or verified."""


class ModelError(PipeserveError):
    """The model file cannot be served. The text starts with the file's path."""

    def __init__(self, path: Path | str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = Path(path)
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.problem)


class GGUFFormatError(ModelError):
    """Not a GGUF file, or a truncated or inconsistent one."""


class MissingTensorError(ModelError):
    """The architecture needs a tensor that the file lacks."""


class UnsupportedModelError(ModelError):
    """An architecture, quantisation or tokenizer that is not built in."""


class VocabularyMismatchError(ModelError):
    """Tokenizer and embedding disagree about the size of the vocabulary."""


class RequestError(PipeserveError):
    """The client asked for something that cannot be done; `param` names the field at fault."""

    def __init__(self, problem: str, *, param: str | None = None) -> None:
        super().__init__(problem)
        self.param = param


class InvalidParameterError(RequestError):
    """One field has a wrong value."""


class PromptTooLongError(RequestError):
    """The prompt, or prompt and output together, do not fit the context."""


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""


class UnauthorizedError(RequestError):
    """The request brings no API key, or one that is not known here."""


class ChatTemplateError(RequestError):
    """The model's chat template refused the messages or is broken."""


class GrammarError(RequestError):
    """A schema or grammar cannot be honoured: not understood, contradictory or too complex."""


class QueueFullError(RequestError):
    """Too many requests wait; `retry_after_s` says when to come back."""

    def __init__(self, problem: str, *, retry_after_s: int) -> None:
        super().__init__(problem)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), retry_after_s=self.retry_after_s), self.args


class EngineError(PipeserveError):
    """Serving itself failed; the request was not at fault."""


class NotReadyError(EngineError):
    """The daemon is loading, restarting or draining and takes no requests."""


class TextTimeoutError(EngineError):
    """Parsing, templating and tokenising a request took longer than text_timeout_s."""


class RequestTimeoutError(EngineError):
    """The answer was not complete within the request's timeout or request_timeout_s."""


class StageFailedError(EngineError):
    """A stage thread raised or the engine process died; every request in the pipeline is lost."""


class StageStalledError(EngineError):
    """A stage thread, or the engine itself, made no progress for stage_timeout_s."""
