"""Answers of megabytes are made and sent in small steps, between which others have their turn."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from pipeserve.server import json_pieces
from pipeserve.server.completion_replies import CompletionReply
from pipeserve.server.json_pieces import SLICE, list_items, text_pieces
from pipeserve.server.responses import ScoreColumns
from pipeserve.server.scores import ScoredToken
from tests.server.conftest import Server
from tests.server.fakes import text_answer

PROMPT = "words and more of them " * 15
ECHO = {"model": "tiny", "prompt": PROMPT, "echo": True, "logprobs": 2, "max_tokens": 4}
NUM_SLICES = len(PROMPT) // SLICE


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What every single call of the encoder made."""
    made: list[str] = []

    def dumps(value: Any, **options: Any) -> str:
        made.append(json.dumps(value, **options))
        return made[-1]

    monkeypatch.setattr(json_pieces, "json", SimpleNamespace(dumps=dumps))
    return made


@asynccontextmanager
async def counted_turns() -> AsyncIterator[list[int]]:
    """How often another task had its turn."""
    turns = [0]

    async def count() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(count())
    yield turns
    task.cancel()


async def test_scores_of_a_long_prompt_are_made_in_slices(
    server: Server, encoded: list[str]
) -> None:
    server.engine.answer = text_answer("abcd")
    status, answer = await server.post("/v1/completions", ECHO)
    assert status == 200
    choice = answer["choices"][0]  # type: ignore[index]
    assert choice["text"] == f"{PROMPT}abcd"
    assert "".join(choice["logprobs"]["tokens"]) == f"<|begin|>{PROMPT}abcd"
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == [0, *range(len(PROMPT) + 4)]
    whole = json.dumps(choice["logprobs"]["top_logprobs"])
    assert max(map(len, encoded)) < len(whole) / NUM_SLICES * 1.5


async def test_a_streamed_echo_comes_in_slices_with_their_text(server: Server) -> None:
    server.engine.answer = text_answer("abcd")
    async with server.async_openai() as client:
        stream = await client.completions.create(**ECHO, stream=True)  # type: ignore[call-overload]
        choices = [chunk.choices[0] async for chunk in stream]
    assert "".join(choice.text for choice in choices) == f"{PROMPT}abcd"
    scored = [choice.logprobs.tokens for choice in choices if choice.logprobs]
    assert max(map(len, scored)) == SLICE
    assert "".join(token for tokens in scored for token in tokens) == f"<|begin|>{PROMPT}abcd"
    for choice, tokens in zip(choices, scored, strict=False):
        assert choice.text == "".join(tokens).removeprefix("<|begin|>")


async def test_others_have_their_turn_between_slices(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.engine.answer = text_answer("abcd")
    score = CompletionReply.score
    async with counted_turns() as turns:
        at: list[int] = []

        def noted_score(self: CompletionReply, scored: Sequence[ScoredToken]) -> ScoreColumns:
            if len(scored) > 1:  # of the prompt
                at.append(turns[0])
            return score(self, scored)

        monkeypatch.setattr(CompletionReply, "score", noted_score)
        await server.post("/v1/completions", ECHO)
    assert len(at) > NUM_SLICES
    assert len(set(at)) == len(at)


@pytest.mark.parametrize("options", [{}, {"with_pieces": True}, {"return_token_strs": True}])
async def test_tokens_are_encoded_in_slices(
    options: dict[str, object], server: Server, encoded: list[str]
) -> None:
    text = "aé" * 5000
    status, answer = await server.post("/tokenize", {"content": text, **options})
    assert status == 200
    tokens = answer["tokens"]
    assert isinstance(tokens, list)
    assert answer["count"] == len(tokens) == 15_000
    if "with_pieces" in options:
        assert tokens[0] == {"id": 97, "piece": "a"}
        assert tokens[1] == {"id": 0xC3, "piece": [0xC3]}
    if "return_token_strs" in options:
        assert answer["token_strs"][:2] == ["a", "\ufffd"]  # type: ignore[index]
    assert max(map(len, encoded)) < 40 * SLICE


async def test_long_bodies_are_sent_in_parts(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_pieces, "SEND_BYTES", 1000)
    monkeypatch.setattr(json_pieces, "SLICE_OF_TEXT", 100)
    text = "é\u2028😀" * 1000
    write = web.StreamResponse.write
    async with counted_turns() as turns:
        at: list[int] = []

        async def noted_write(self: web.StreamResponse, data: bytes) -> None:
            at.append(turns[0])
            await write(self, data)

        monkeypatch.setattr(web.StreamResponse, "write", noted_write)
        body = {"messages": [{"role": "user", "content": text}]}
        status, answer = await server.post("/apply-template", body)
    assert (status, answer) == (200, {"prompt": f"user:{text}\nassistant:"})
    assert len(at) > 10
    assert len(set(at)) == len(at)


@given(text=st.text(st.characters(exclude_categories=["Cs"])), length=st.integers(1, 9))
def test_pieces_of_a_text_are_the_text(text: str, length: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_pieces, "SLICE_OF_TEXT", length)
        assert json.loads("".join(text_pieces(text))) == text


@given(values=st.lists(st.integers() | st.text(max_size=3), max_size=3 * SLICE))
def test_slices_of_a_list_are_the_list(values: list[Any]) -> None:
    assert json.loads(f"[{''.join(list_items(values, lambda value: value))}]") == values
