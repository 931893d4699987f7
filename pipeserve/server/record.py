"""RequestRecord: what one request's log line and the latency metrics say about it.

Runs on the event loop; filled while the request is served, read once when it ends.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pipeserve.engine.messages import FinishReason
from pipeserve.server.api_keys import ANYBODY
from pipeserve.server.metrics import Metrics

CLIENT_DISCONNECTED = "client disconnected"


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """Times are those of time.monotonic, in seconds."""

    request_id: str
    metrics: Metrics
    started_at: float = field(default_factory=time.monotonic)
    key_label: str = ANYBODY
    """Whose API key it brought; never the key."""
    traceparent: str | None = None
    """Of the request's own span; None where it is not traced."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    submitted_at: float | None = None
    """When the engine got it."""
    first_token_at: float | None = None
    last_token_at: float | None = None
    finish_reasons: set[FinishReason] = field(default_factory=set)
    error: str | None = None
    """Why there is no complete answer, never with text from the request; None where there is."""

    def tokens_arrived(self, num_tokens: int, previous_at: float | None) -> float:
        """Counts tokens of one sequence, whose last ones came at previous_at; returns now."""
        now = time.monotonic()
        self.output_tokens += num_tokens
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now
            self.metrics.first_token(now - self.started_at)
        if previous_at is not None:
            self.metrics.next_tokens(num_tokens, now - previous_at)
        return now

    def sequence_finished(self, reason: FinishReason) -> None:
        self.finish_reasons.add(reason)
        self.metrics.sequence_finished(reason)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_at is None else self.first_token_at - self.started_at

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens of all choices per second, from the first token to the last."""
        if self.first_token_at is None or self.last_token_at is None:
            return None
        elapsed_s = self.last_token_at - self.first_token_at
        return max(0, self.output_tokens - 1) / elapsed_s if elapsed_s > 0 else None

    def request_finished(self) -> None:
        """Takes the latency of a complete answer."""
        if self.error is None and self.finish_reasons:
            self.metrics.request_finished(time.monotonic() - self.started_at)

    def log_fields(self) -> dict[str, object]:
        """The fields of the log line; those that do not apply are left out."""
        fields: dict[str, object] = {"request_id": self.request_id}
        if self.key_label != ANYBODY:
            fields["key"] = self.key_label
        if self.prompt_tokens:
            fields |= {"prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens}
        if self.ttft_s is not None:
            fields["ttft_s"] = round(self.ttft_s, 4)
        if self.tokens_per_s is not None:
            fields["tokens_per_s"] = round(self.tokens_per_s, 1)
        if self.finish_reasons:
            reasons = sorted(reason.value for reason in self.finish_reasons)
            fields["finish_reason"] = ",".join(reasons)
        if self.error is not None:
            fields["error"] = self.error
        fields["duration_s"] = round(time.monotonic() - self.started_at, 4)
        return fields
