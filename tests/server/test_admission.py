"""What a request says about its place in the line, its time and what it shares."""

from __future__ import annotations

import asyncio

import openai
import pytest

from pipeserve.core.admission import AdmissionParams
from pipeserve.engine.messages import TokenEvents
from tests.server.conftest import Server

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


async def test_the_fields_reach_the_engine(server: Server) -> None:
    fields = {"priority": -3, "cache_salt": "tenant", "service_tier": "flex"}
    status, _ = await server.post("/v1/chat/completions", {**CHAT, **fields})
    assert status == 200
    assert server.engine.submitted[0].admission == AdmissionParams(
        priority=-3, cache_salt="tenant", is_background=True, account="anybody"
    )


async def test_without_them_a_request_is_a_plain_one(server: Server) -> None:
    await server.post("/v1/chat/completions", {**CHAT, "service_tier": "auto", "priority": None})
    assert server.engine.submitted[0].admission == AdmissionParams(account="anybody")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"priority": 2**31}, "priority is 2147483648; it must be at most 2147483647"),
        ({"priority": 1.5}, "priority is 1.5; it must be an integer"),
        ({"timeout": 0}, "timeout is 0; "),
        ({"cache_salt": ""}, "cache_salt is "),
        ({"cache_salt": "x" * 300}, "a string of at most 256 characters"),
    ],
)
async def test_wrong_ones_are_refused(
    server: Server, fields: dict[str, object], message: str
) -> None:
    status, body = await server.post("/v1/chat/completions", {**CHAT, **fields})
    assert status == 400
    assert message in body["error"]["message"]  # type: ignore[index]


async def test_an_answer_that_takes_too_long_is_cut_off(server: Server) -> None:
    server.engine.answer = lambda submit: []  # the engine never says anything
    status, body = await server.post("/v1/chat/completions", {**CHAT, "timeout": 0.05})
    assert status == 504
    assert body["error"]["code"] == "request_timeout"  # type: ignore[index]
    assert server.engine.aborted == [0]


async def test_a_stream_that_takes_too_long_ends_with_an_error(server: Server) -> None:
    server.engine.answer = lambda submit: [[104], [105]]
    async with server.async_openai() as client:
        stream = await client.chat.completions.create(
            **CHAT, stream=True, extra_body={"timeout": 0.05}
        )
        with pytest.raises(openai.APIError, match=r"not complete within 0\.05 s"):
            async for _ in stream:
                pass
    assert server.engine.aborted == [0]


async def test_usage_counts_what_no_choice_of_a_prompt_computed(server: Server) -> None:
    server.engine.answer = lambda submit: []

    async def finish() -> None:
        await server.engine.until(lambda: len(server.engine.submitted) == 4)
        for seq_id, num_cached in enumerate([0, 16, 32, 16]):
            cached = ((seq_id, num_cached),) if num_cached else ()
            server.engine.client.deliver(
                TokenEvents(
                    seq_ids=(),
                    token_ids=(),
                    finish_reasons=(),
                    logprobs=(),
                    num_cached_tokens=cached,
                )
            )
            server.engine.send(seq_id, 104, is_last=True)

    async with server.async_openai() as client, asyncio.TaskGroup() as group:
        group.create_task(finish())
        answer = await client.completions.create(model="tiny", prompt=["a", "b"], n=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
