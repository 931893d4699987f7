"""ChatReply: the JSON of /v1/chat/completions.

Runs on the event loop.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable
from json.encoder import encode_basestring_ascii

from pipeserve.server.json_pieces import to_json
from pipeserve.server.responses import LEAST_LOGPROB, Json, Reply
from pipeserve.server.scores import ScoredToken
from pipeserve.text.answer import AnswerParts
from pipeserve.text.call_reader import CallDelta

_LETTERS = string.ascii_letters + string.digits


class ChatReply(Reply):
    """Answers of /v1/chat/completions."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    _no_content = '"delta":{}'
    _score_names = ("content",)
    _score_end = ',"refusal":null'

    def opening(self, index: int) -> str:
        return (
            f'{self._chunk_start}{{"index":{index},"delta":{{"role":"assistant","content":""}},'
            f'"logprobs":null,"finish_reason":null}}{self._end(index, 0)}'
        )

    def _content(self, parts: AnswerParts) -> str:
        if not (parts.reasoning or parts.calls):
            return f'"delta":{{"content":{encode_basestring_ascii(parts.text)}}}'
        delta: Json = {}
        if parts.reasoning:
            delta["reasoning_content"] = parts.reasoning
        if parts.text:
            delta["content"] = parts.text
        if parts.calls:
            delta["tool_calls"] = [self._call_delta(call) for call in parts.calls]
        return f'"delta":{to_json(delta)}'

    def _whole_content(self, parts: AnswerParts) -> Json:
        has_text = parts.text or not parts.calls
        message: Json = {
            "role": "assistant",
            "content": parts.text if has_text else None,
            "refusal": None,
        }
        if parts.reasoning:
            message["reasoning_content"] = parts.reasoning
        if parts.calls:
            message["tool_calls"] = self._whole_calls(parts.calls)
        return {"message": message}

    def _call_delta(self, call: CallDelta) -> Json:
        if call.name is None:
            return {"index": call.index, "function": {"arguments": call.arguments}}
        return {"index": call.index, **self._call(call.name, call.arguments)}

    def _whole_calls(self, deltas: Iterable[CallDelta]) -> list[Json]:
        calls: list[tuple[str, list[str]]] = []
        for delta in deltas:
            if delta.name is not None:
                calls.append((delta.name, []))
            calls[delta.index][1].append(delta.arguments)
        return [self._call(name, "".join(arguments)) for name, arguments in calls]

    def _call(self, name: str, arguments: str) -> Json:
        form = self._plan.form.tool_calls
        if form is not None and form.has_short_ids:
            call_id = "".join(secrets.choice(_LETTERS) for _ in range(9))
        else:
            call_id = f"call_{secrets.token_hex(12)}"
        function = {"name": name, "arguments": arguments}
        return {"id": call_id, "type": "function", "function": function}

    def _score(self, token: ScoredToken) -> tuple[Json]:
        logprobs = token.logprobs
        assert logprobs is not None, "only echoed tokens have none, and a chat echoes nothing"
        pairs = zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
        score = {
            **self._token(token.token_id, logprobs.logprob),
            "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in pairs],
        }
        return (score,)

    def _token(self, token_id: int, logprob: float) -> Json:
        raw = self._tokenizer.token_bytes(token_id, skip_special=False)
        return {
            "token": raw.decode(errors="replace"),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(raw),
        }
