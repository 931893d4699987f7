"""CompletionReply: the JSON of /v1/completions.

Runs on the event loop.
"""

from __future__ import annotations

from json.encoder import encode_basestring_ascii
from typing import Any

from pipeserve.server.responses import LEAST_LOGPROB, Json, Reply
from pipeserve.server.scores import ScoredToken
from pipeserve.text.answer import AnswerParts


class CompletionReply(Reply):
    """Answers of /v1/completions."""

    id_prefix = "cmpl"
    object_name = "text_completion"
    chunk_name = "text_completion"
    _no_content = '"text":""'
    _score_names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")

    def opening(self, index: int) -> None:
        return None

    def _content(self, parts: AnswerParts) -> str:
        return f'"text":{encode_basestring_ascii(parts.text)}'

    def _whole_content(self, parts: AnswerParts) -> Json:
        return {"text": parts.text}

    def _score(self, token: ScoredToken) -> tuple[Any, ...]:
        return self._token(token.token_id), _logprob(token), self._top(token), token.text_offset

    def _top(self, token: ScoredToken) -> dict[str, float] | None:
        """The likeliest tokens; the one that was chosen is always among them."""
        logprobs = token.logprobs
        if logprobs is None:
            return None
        pairs = zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
        top = {self._token(token_id): max(value, LEAST_LOGPROB) for token_id, value in pairs}
        top.setdefault(self._token(token.token_id), max(logprobs.logprob, LEAST_LOGPROB))
        return top

    def _token(self, token_id: int) -> str:
        """Pieces of a character are told apart by their bytes, which this format has no place
        for otherwise (as OpenAI's own answers have them)."""
        raw = self._tokenizer.token_bytes(token_id, skip_special=False)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _logprob(token: ScoredToken) -> float | None:
    return None if token.logprobs is None else max(token.logprobs.logprob, LEAST_LOGPROB)
