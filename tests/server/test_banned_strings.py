"""banned_strings over HTTP: what reaches the engine, what is refused, what answers hold."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from pipeserve.core.constraint import BannedStrings
from pipeserve.core.sampling import SamplingParams
from pipeserve.text.banned_text import BannedTextWatches
from tests.engine.running import running_engine
from tests.fakes import facts
from tests.server.conftest import Server, running_server
from tests.server.fakes import ByteTokenizer

USER = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
WORDS = b"ab aB\n"


@pytest.mark.parametrize("field", ["x", ["x"], ("x",)])
async def test_one_or_several_reach_the_engine(server: Server, field: object) -> None:
    body = {"model": "tiny", "prompt": "a", "n": 2, "stop": "z", "banned_strings": field}
    status, _ = await server.post("/v1/completions", body)
    assert status == 200
    banned = [submitted.banned for submitted in server.engine.submitted]
    assert banned == [BannedStrings(strings=("x",), stop=("z",))] * 2


@pytest.mark.parametrize("field", [None, [], ""])
async def test_none_are_none_and_an_empty_one_is_refused(server: Server, field: object) -> None:
    status, answer = await server.post(
        "/v1/chat/completions", {"model": "tiny", "messages": [USER], "banned_strings": field}
    )
    if field == "":
        assert status == 400
        assert answer["error"]["param"] == "banned_strings"
    else:
        assert status == 200
        assert server.engine.submitted[0].banned is None


@pytest.mark.parametrize(
    ("fields", "param", "mend"),
    [
        ({"banned_strings": ["a", ""]}, "banned_strings[1]", "at least 1 character"),
        ({"banned_strings": ["a" * 101]}, "banned_strings[0]", "at most 100 characters"),
        ({"banned_strings": ["a"] * 201}, "banned_strings", "at most 200"),
        ({"banned_strings": 7}, "banned_strings", "a string or a list"),
        ({"banned_strings": ["\ufffd"]}, "banned_strings", "leave it out"),
        (
            {"banned_strings": "a", "response_format": {"type": "json_object"}},
            "banned_strings",
            "so is response_format",
        ),
        (
            {"banned_strings": "a", "tools": [TOOL], "tool_choice": "required"},
            "banned_strings",
            "so is tool_choice",
        ),
        ({"banned_strings": "a", "tools": [TOOL]}, "banned_strings", "so is tools,"),
        ({"banned_strings": "a", "mirostat": 2}, "banned_strings", "so is mirostat"),
        ({"bad_words": ["a"]}, "bad_words", "send banned_strings"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    server: Server, fields: dict[str, object], param: str, mend: str
) -> None:
    status, answer = await server.post(
        "/v1/chat/completions", {"model": "tiny", "messages": [USER], **fields}
    )
    assert status == 400
    assert answer["error"]["param"] == param
    assert mend in answer["error"]["message"]


def few_letters(token_ids: Sequence[int], sampling: SamplingParams) -> int:
    return WORDS[zlib.crc32(bytes(str(token_ids), "ascii"), sampling.seed) % len(WORDS)]


def another(token_id: int, allowed: Sequence[int]) -> int:
    usual = [each for each in WORDS if each in allowed]
    choice = usual or allowed
    return choice[token_id % len(choice)]


@pytest.fixture
async def writing() -> AsyncIterator[Server]:
    """A server whose model writes a, b and spaces."""
    watches = BannedTextWatches(ByteTokenizer)  # type: ignore[arg-type]
    pipeline = facts(num_blocks=256, context_length=256, vocab_size=ByteTokenizer.vocab_size)
    async with (
        running_server() as server,
        running_engine(
            pipeline_facts=pipeline, watches=watches.build, next_token=few_letters, pick=another
        ) as running,
    ):
        server.state.ready(replace(server.services, engine=running.client))
        yield server


@pytest.mark.parametrize("banned", [["aa"], ["AB", "ba ", " b"], ["a b a", "bb"], [" "]])
@pytest.mark.parametrize("stop", [[], ["\n"], ["b\n", "a a"]])
async def test_no_answer_holds_one(writing: Server, banned: list[str], stop: list[str]) -> None:
    """Streamed or not, several at once, with the log-probabilities of what is there."""
    body = {"banned_strings": banned}
    async with writing.async_openai() as client:
        whole = await client.completions.create(
            model="tiny", prompt="x", n=6, seed=1, max_tokens=60, stop=stop or None,
            logprobs=0, extra_body=body,
        )  # fmt: skip
        free = await client.completions.create(
            model="tiny", prompt="x", n=6, seed=1, max_tokens=60, stop=stop or None
        )
        stream = await client.completions.create(
            model="tiny", prompt="x", n=6, seed=1, max_tokens=60, stop=stop or None,
            stream=True, extra_body=body,
        )  # fmt: skip
        texts = [""] * 6
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                assert not any(each.lower() in texts[choice.index].lower() for each in banned)
    assert texts == [choice.text for choice in whole.choices]
    assert [choice.text for choice in free.choices] != texts
    for choice in whole.choices:
        assert choice.logprobs is not None
        # A token that a stop string begins with is among them.
        assert "".join(choice.logprobs.tokens or []).startswith(choice.text)
        if choice.finish_reason == "length":
            assert len(choice.text) == 60
    assert any(any(each.lower() in c.text.lower() for each in banned) for c in free.choices)


async def test_sequences_with_and_without(writing: Server) -> None:
    async with writing.async_openai() as client:

        async def write(seed: int, banned: list[str]) -> str:
            answer = await client.completions.create(
                model="tiny", prompt="x", seed=seed, max_tokens=50,
                extra_body={"banned_strings": banned},
            )  # fmt: skip
            return answer.choices[0].text

        asked = [(seed, ["ab", "ba"] if seed % 2 else []) for seed in range(12)]
        alone = [await write(*each) for each in asked]
        assert await asyncio.gather(*(write(*each) for each in asked)) == alone
