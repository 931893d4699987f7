"""Locust users that stream chats from an OpenAI-compatible server.

Besides the whole request, two more rows: TTFT (time to the first text) and ITL (time between
two pieces of text). Run by `make loadtest`; MODEL and MAX_TOKENS come from the environment.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator

from locust import HttpUser, between, task
from locust.clients import ResponseContextManager
from workloads import mixed

MAX_TOKENS = int(os.environ.get("MAX_TOKENS", "64"))


class ChatUser(HttpUser):
    """Asks, reads the whole stream, pauses for a moment, asks again."""

    wait_time = between(0.0, 0.5)

    def on_start(self) -> None:
        served = self.client.get("/v1/models").json()["data"][0]["id"]
        self.model = os.environ.get("MODEL", served)

    @task
    def chat(self) -> None:
        body = {
            "model": self.model,
            "messages": mixed(random.randrange(1_000_000)),
            "max_tokens": MAX_TOKENS,
            "stream": True,
        }
        started = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True
        ) as response:
            if response.status_code != 200:
                _fail(response, f"status {response.status_code}: {response.text[:200]}")
                return
            self._report(started, response)

    def _report(self, started: float, response: ResponseContextManager) -> None:
        last = None
        is_done = False
        for data in _events(response):
            if data == "[DONE]":
                is_done = True
                break
            event = json.loads(data)
            if "error" in event:
                _fail(response, event["error"]["message"])
                return
            if not any(choice["delta"].get("content") for choice in event["choices"]):
                continue
            now = time.perf_counter()
            self._fire("TTFT" if last is None else "ITL", now - (last or started))
            last = now
        if not is_done:
            _fail(response, "the stream ended without [DONE]")

    def _fire(self, request_type: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type=request_type,
            name="/v1/chat/completions",
            response_time=seconds * 1000,
            response_length=0,
            exception=None,
            context={},
        )


def _fail(response: ResponseContextManager, problem: str) -> None:
    response.failure(problem)  # type: ignore[no-untyped-call]


def _events(response: ResponseContextManager) -> Iterator[str]:
    # None hands on each piece of the chunked body as it arrives; a size would wait for more.
    for line in response.iter_lines(chunk_size=None):  # type: ignore[call-overload]
        if line.startswith(b"data: "):
            yield line.removeprefix(b"data: ").decode()
