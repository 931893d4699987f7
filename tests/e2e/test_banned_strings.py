"""The demo model kept from phrases, with the engine in the daemon's process and in its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.daemon_process import DaemonProcess, daemon

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module", params=["one", "two"])
def served(request: pytest.FixtureRequest, demo_model_path: object) -> Iterator[DaemonProcess]:
    with daemon("--processes", request.param) as running:
        yield running


@pytest.fixture
def client(served: DaemonProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        yield client


def ask(client: openai.OpenAI, **body: object) -> str:
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, max_tokens=24, extra_body=body
    )
    return answer.choices[0].message.content or ""


def test_the_answer_takes_another_way_from_where_the_phrase_begins(client: openai.OpenAI) -> None:
    free = ask(client)
    words = free.split(" ")
    assert len(words) > 5
    phrase = " ".join(words[3:5])
    kept = ask(client, banned_strings=[phrase.upper()])
    assert phrase in free
    assert phrase.lower() not in kept.lower()
    assert kept.startswith(" ".join(words[:3]))
    assert kept != free
    stream = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, max_tokens=24, stream=True,
        extra_body={"banned_strings": phrase},
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == kept


def test_beside_other_samplers(client: openai.OpenAI) -> None:
    samplers = {"xtc_probability": 1, "dry_multiplier": 1, "repeat_penalty": 1.2}
    banned = ["the", "is", "france", ","]
    kept = ask(client, banned_strings=banned, **samplers)
    assert not any(each in kept.lower() for each in banned)
    assert kept == ask(client, banned_strings=banned, **samplers)


async def test_other_rows_have_the_same_tokens(served: DaemonProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:

        async def write(seed: int, banned: list[str]) -> str:
            answer = await client.completions.create(
                model="demo", prompt=f"{seed}. Once", max_tokens=20, seed=seed,
                extra_body={"banned_strings": banned},
            )  # fmt: skip
            return answer.choices[0].text

        asked = [(seed, ["the", " of"] if seed % 2 else []) for seed in range(6)]
        alone = [await write(*each) for each in asked]
        together = await asyncio.gather(*(write(*each) for each in asked))
    assert together == alone
    assert not any("the" in text.lower() or " of" in text.lower() for text in together[1::2])
