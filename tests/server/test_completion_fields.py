"""What /v1/completions has and a chat has not: echo with scores, suffix, prompts in every form."""

from __future__ import annotations

import pytest

from tests.server.conftest import Server
from tests.server.fakes import BOS, EOS, text_answer


@pytest.mark.parametrize("is_stream", [False, True])
async def test_echo_begins_every_choice_with_its_prompt(server: Server, is_stream: bool) -> None:
    server.engine.answer = text_answer("cd")
    async with server.async_openai() as client:
        if is_stream:
            stream = await client.completions.create(
                model="tiny", prompt=["ab", "é"], echo=True, stream=True
            )
            texts = ["", ""]
            async for chunk in stream:
                texts[chunk.choices[0].index] += chunk.choices[0].text
        else:
            answer = await client.completions.create(model="tiny", prompt=["ab", "é"], echo=True)
            texts = [choice.text for choice in answer.choices]
    assert texts == ["abcd", "écd"]
    assert all(submit.sampling.num_prompt_logprobs is None for submit in server.engine.submitted)


async def test_echo_with_logprobs_scores_the_prompt_but_its_first_token(server: Server) -> None:
    server.engine.answer = text_answer("d")
    async with server.async_openai() as client:
        answer = await client.completions.create(
            model="tiny", prompt=[97, 98, 99], echo=True, logprobs=2, max_tokens=1
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b", "c", "d"]
    assert logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
    assert logprobs.text_offset == [0, 1, 2, 3]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[1] == {"b": -0.5, "c": -1.5}
    assert answer.choices[0].text == "abcd"
    assert server.engine.submitted[0].sampling.num_prompt_logprobs == 2


async def test_an_answer_that_ends_at_once_has_a_score_behind_the_prompts(server: Server) -> None:
    """A harness takes the last away as the one generated token's, whatever that is."""
    server.engine.answer = text_answer("")
    async with server.async_openai() as client:
        answer = await client.completions.create(
            model="tiny", prompt=[97, 98], echo=True, logprobs=1, max_tokens=1
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b", "<|end|>"]
    assert logprobs.text_offset == [0, 1, 2]
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_no_tokens_but_the_echo(server: Server, is_stream: bool) -> None:
    """As a harness asks that wants nothing but the likelihood of a text."""
    async with server.async_openai() as client:
        fields = {"model": "tiny", "prompt": "ab", "echo": True, "max_tokens": 0, "logprobs": 1}
        if is_stream:
            stream = await client.completions.create(**fields, stream=True)
            choices = [chunk.choices[0] async for chunk in stream]
            text = "".join(choice.text for choice in choices)
            reason, logprobs = choices[-1].finish_reason, choices[0].logprobs
        else:
            answer = await client.completions.create(**fields)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 0
            text, reason = answer.choices[0].text, answer.choices[0].finish_reason
            logprobs = answer.choices[0].logprobs
    assert (text, reason) == ("ab", "length")
    assert logprobs is not None
    assert logprobs.tokens == ["<|begin|>", "a", "b"]
    assert server.engine.submitted[0].sampling.max_tokens == 1


async def test_a_character_that_the_prompt_leaves_half_is_completed(server: Server) -> None:
    server.engine.answer = text_answer("é".encode()[1:])
    async with server.async_openai() as client:
        answer = await client.completions.create(
            model="tiny", prompt=[97, "é".encode()[0]], echo=True
        )
    assert answer.choices[0].text == "aé"


async def test_suffix_asks_for_the_middle(server: Server) -> None:
    infill = server.services.tokenizer.infill
    assert infill is not None
    async with server.async_openai() as client:
        await client.completions.create(model="tiny", prompt="ab", suffix="yz")
    (submit,) = server.engine.submitted
    expected = [BOS, infill.prefix, *b"ab", infill.suffix, *b"yz", infill.middle]
    assert list(submit.prompt_token_ids) == expected
    assert set(submit.sampling.stop_token_ids) == {EOS, *infill.ends}


async def test_a_text_without_bos(server: Server) -> None:
    async with server.async_openai() as client:
        await client.completions.create(
            model="tiny", prompt="ab", extra_body={"add_special_tokens": False, "typical_p": 1}
        )
    assert list(server.engine.submitted[0].prompt_token_ids) == [*b"ab"]


async def test_usage_of_every_chunk(server: Server) -> None:
    server.engine.answer = text_answer("abc")
    async with server.async_openai() as client:
        stream = await client.completions.create(
            model="tiny",
            prompt="hi",
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
        )
        counts = [chunk.usage and chunk.usage.completion_tokens async for chunk in stream]
    assert counts == [1, 2, 3, 4, 4]
