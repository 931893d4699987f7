"""The real daemon with the demo model, as the openai package and a crowd see it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import openai
import pytest
from aiohttp import ClientSession

from tests.e2e.daemon_process import DaemonProcess, daemon

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def served(demo_model_path: object) -> Iterator[DaemonProcess]:
    with daemon() as running:
        yield running


async def metric(session: ClientSession, url: str, name: str) -> float:
    async with session.get(f"{url}/metrics") as response:
        text = await response.text()
    (line,) = [line for line in text.splitlines() if line.startswith(name + " ")]
    return float(line.split()[-1])


def test_the_openai_package_streams_a_sensible_chat(served: DaemonProcess) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["demo"]
        stream = client.chat.completions.create(
            model="demo",
            messages=CAPITAL,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text
    assert chunks[-2].choices[0].finish_reason == "stop"
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens > 3


def test_a_seed_gives_the_same_text_alone_and_in_company(served: DaemonProcess) -> None:
    def ask(client: openai.OpenAI, n: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model="demo", messages=CAPITAL, temperature=1.0, seed=5, max_tokens=24, n=n
        )
        return [choice.message.content for choice in answer.choices]

    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        (alone,) = ask(client, 1)
        together = ask(client, 6)
    assert together[0] == alone
    assert len(set(together)) > 1


async def test_64_streams_with_random_disconnects_leave_nothing_behind(
    served: DaemonProcess,
) -> None:
    rng = random.Random(3)
    client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

    async def ask(max_tokens: int) -> str:
        answer = await client.chat.completions.create(
            model="demo", messages=CAPITAL, temperature=0, max_tokens=max_tokens
        )
        return answer.choices[0].message.content or ""

    async def stream(index: int) -> None:
        chunks = await client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": f"Count to {index}."}],
            max_tokens=rng.randint(1, 20),
            stream=True,
        )
        leaves_after = rng.randint(0, 10) if index % 2 else None
        num_seen = 0
        async for _ in chunks:
            num_seen += 1
            if num_seen == leaves_after:
                await chunks.close()
                return
        if leaves_after is None:
            assert num_seen > 0

    before = await ask(12)
    await asyncio.gather(*(stream(index) for index in range(64)))
    async with ClientSession() as session, asyncio.timeout(30):
        while await metric(session, served.url, "pipeserve:kv_cache_usage_perc") > 0:
            await asyncio.sleep(0.05)
        assert await metric(session, served.url, "pipeserve:num_requests_running") == 0
    assert await ask(12) == before
    await client.close()


async def test_a_client_that_goes_away_frees_its_blocks_while_others_go_on(
    served: DaemonProcess,
) -> None:
    body = {"model": "demo", "prompt": "Once", "max_tokens": 2000, "ignore_eos": True}
    async with ClientSession() as session, asyncio.timeout(30):
        request = asyncio.create_task(session.post(f"{served.url}/v1/completions", json=body))
        while await metric(session, served.url, "pipeserve:num_requests_running") == 0:
            await asyncio.sleep(0.02)
        request.cancel()
        while await metric(session, served.url, "pipeserve:kv_cache_usage_perc") > 0:
            await asyncio.sleep(0.02)
