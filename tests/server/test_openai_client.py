"""The real openai package, sync and async, against the server."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.server.conftest import Server
from tests.server.fakes import BOS, EOS, MARK, ByteTokenizer, ScriptedEngine, text_answer

MESSAGES = [{"role": "user", "content": "hi"}]


async def _streamed(
    server: Server, **fields: object
) -> list[openai.types.chat.ChatCompletionChunk]:
    async with server.async_openai() as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, **fields
        )
        return [chunk async for chunk in stream]


async def test_chat_whole(server: Server) -> None:
    async with server.async_openai() as client:
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES)
    choice = answer.choices[0]
    assert choice.message.content == "Hello, world"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert (answer.model, answer.system_fingerprint) == ("tiny", "fp_test")
    prompt = [BOS, *b"user:hi\nassistant:"]
    assert list(server.engine.submitted[0].prompt_token_ids) == prompt
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len("Hello, world") + 1  # and the end token
    assert answer.usage.total_tokens == len(prompt) + len("Hello, world") + 1
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_chat_stream_has_role_then_one_event_per_token_then_reason(server: Server) -> None:
    chunks = await _streamed(server)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in chunks[1:-1]] == list("Hello, world")
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].delta.content is None
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)


async def test_stream_usage_comes_last_without_choices(server: Server) -> None:
    chunks = await _streamed(server, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len("Hello, world") + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def _talk_without_a_loop(client: openai.OpenAI) -> tuple[str | None, str, str]:
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES)
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    plain = client.completions.create(model="tiny", prompt="hi")
    return whole.choices[0].message.content, streamed, plain.choices[0].text


async def test_sync_client(server: Server) -> None:
    texts = await asyncio.to_thread(lambda: _talk_without_a_loop(server.sync_openai()))
    assert texts == ("Hello, world", "Hello, world", "Hello, world")


async def test_models(server: Server) -> None:
    async with server.async_openai() as client:
        models = [model async for model in client.models.list()]
        assert [model.id for model in models] == ["tiny"]
        assert (await client.models.retrieve("tiny")).owned_by == "pipeserve"
        with pytest.raises(openai.NotFoundError) as refusal:
            await client.models.retrieve("owner/other")
    assert refusal.value.code == "model_not_found"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_stop_string_across_tokens_is_cut_and_ends_the_sequence(
    server: Server, is_stream: bool
) -> None:
    server.engine.answer = text_answer("one END two", ends=False)
    if is_stream:
        chunks = await _streamed(server, stop=["END"])
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        async with server.async_openai() as client:
            answer = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, stop=["END"]
            )
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len("one END")
    assert (text, reason) == ("one ", "stop")
    assert server.engine.finished == [0]
    assert server.engine.aborted == []


async def test_text_that_only_looked_like_a_stop_string_is_sent_at_the_end(server: Server) -> None:
    server.engine.answer = text_answer("one EN")
    async with server.async_openai() as client:
        answer = await client.completions.create(model="tiny", prompt="a", stop="END")
    assert answer.choices[0].text == "one EN"
    assert answer.choices[0].finish_reason == "stop"


async def test_tokens_after_a_stop_string_in_the_same_batch_do_not_count(server: Server) -> None:
    server.engine.answer = text_answer("one.two", per_batch=8)
    async with server.async_openai() as client:
        answer = await client.completions.create(model="tiny", prompt="a", stop=".")
    assert answer.choices[0].text == "one"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


@pytest.mark.parametrize("is_stream", [False, True])
async def test_max_tokens_ends_with_length(server: Server, is_stream: bool) -> None:
    async with server.async_openai() as client:
        if is_stream:
            stream = await client.completions.create(
                model="tiny", prompt="a", max_tokens=5, stream=True
            )
            chunks = [chunk async for chunk in stream]
            text = "".join(chunk.choices[0].text for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            answer = await client.completions.create(model="tiny", prompt="a", max_tokens=5)
            text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert (text, reason) == ("Hello", "length")


async def test_a_character_of_several_tokens_is_one_event(server: Server) -> None:
    server.engine.answer = text_answer("aé😀b")
    chunks = await _streamed(server)
    assert [chunk.choices[0].delta.content for chunk in chunks[1:-1]] == ["a", "é", "😀", "b"]


async def test_half_a_character_at_the_end_is_a_replacement_character(server: Server) -> None:
    server.engine.answer = text_answer("a😀".encode()[:3])
    async with server.async_openai() as client:
        answer = await client.completions.create(model="tiny", prompt="a")
    assert answer.choices[0].text == "a\ufffd"


async def test_odd_characters_survive_the_stream(server: Server) -> None:
    text = 'quote " backslash \\ newline \n separator \u2028 next line \x85 nul \0'
    server.engine.answer = text_answer(text)
    chunks = await _streamed(server)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def _answer_by_seed(engine: ScriptedEngine) -> None:
    engine.answer = lambda submit: [[ord("0") + submit.sampling.seed % 10], [ord("!")], [EOS]]


async def test_choices_have_consecutive_seeds(server: Server) -> None:
    _answer_by_seed(server.engine)
    async with server.async_openai() as client:
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, n=3, seed=4)
    assert [choice.message.content for choice in answer.choices] == ["4!", "5!", "6!"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 1 + len("user:hi\nassistant:")
    assert answer.usage.completion_tokens == 9


async def test_choices_without_a_seed_have_different_ones(server: Server) -> None:
    async with server.async_openai() as client:
        await client.completions.create(model="tiny", prompt="a", n=4)
    assert len({submit.sampling.seed for submit in server.engine.submitted}) == 4


async def test_choices_of_a_stream(server: Server) -> None:
    _answer_by_seed(server.engine)
    chunks = await _streamed(server, n=3, seed=0, stream_options={"include_usage": True})
    texts = ["", "", ""]
    reasons: list[str | None] = [None, None, None]
    for chunk in chunks[:-1]:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == ["0!", "1!", "2!"]
    assert reasons == ["stop"] * 3
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[257, 97, 98]]),
        (["a", "b"], [[257, 97], [257, 98]]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_forms_of_prompt(
    server: Server, prompt: str | list[str], expected: list[list[int]]
) -> None:
    async with server.async_openai() as client:
        answer = await client.completions.create(model="tiny", prompt=prompt, n=2)
    submitted = [list(submit.prompt_token_ids) for submit in server.engine.submitted]
    assert submitted == [ids for ids in expected for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(2 * len(expected)))
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, expected))


async def test_chat_logprobs(server: Server) -> None:
    server.engine.answer = text_answer("hé")
    async with server.async_openai() as client:
        answer = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.bytes for token in logprobs.content] == [[104], [0xC3], [0xA9]]
    first = logprobs.content[0]
    assert (first.token, first.logprob) == ("h", -0.5)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [
        ("h", -0.5),
        ("i", -1.5),
        ("j", -9999.0),
    ]


async def test_chat_logprobs_stream_once_per_token(server: Server) -> None:
    server.engine.answer = text_answer("hé!")
    chunks = await _streamed(server, logprobs=True)
    tokens = [
        [token.bytes for token in chunk.choices[0].logprobs.content or []]
        for chunk in chunks
        if chunk.choices[0].logprobs is not None
    ]
    assert tokens == [[[104]], [[0xC3], [0xA9]], [[33]]]


async def test_logprobs_end_where_a_stop_string_cuts(server: Server) -> None:
    server.engine.answer = text_answer("abENDc", ends=False)
    async with server.async_openai() as client:
        answer = await client.completions.create(model="tiny", prompt="a", logprobs=0, stop="END")
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b"]


async def test_completion_logprobs(server: Server) -> None:
    server.engine.answer = lambda _: [[ord("a")], [0xC3], [0xA9], [MARK], [ord("b")], [EOS]]
    async with server.async_openai() as client:
        answer = await client.completions.create(model="tiny", prompt="a", logprobs=2)
    assert answer.choices[0].text == "aéb"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "<|mark|>", "b", "<|end|>"]
    assert logprobs.token_logprobs == [-0.5] * 6
    assert logprobs.text_offset == [0, 1, 1, 2, 2, 3]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"a": -0.5, "b": -1.5}


async def test_sampling_fields_reach_the_engine(server: Server) -> None:
    async with server.async_openai() as client:
        await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            temperature=0.5,
            top_p=0.9,
            max_completion_tokens=7,
            max_tokens=9,
            presence_penalty=0.25,
            frequency_penalty=-0.5,
            logit_bias={"65": -100, "66": 1},
            seed=-1,
            extra_body={
                "top_k": 1000,
                "min_p": 0.1,
                "repetition_penalty": 1.1,
                "min_tokens": 2,
                "stop_token_ids": [10],
            },
        )
    sampling = server.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.5, 0.9, 0.1)
    assert (sampling.max_tokens, sampling.min_tokens) == (7, 2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -0.5)
    assert sampling.repetition_penalty == 1.1
    assert sampling.logit_bias == ((65, -100.0), (66, 1.0))
    assert sampling.stop_token_ids == (10, EOS)
    assert sampling.top_k == server.services.tokenizer.vocab_size
    assert sampling.seed == 2**63 - 1
    assert sampling.num_logprobs is None


async def test_ignore_eos_leaves_only_the_requests_own_stop_tokens(server: Server) -> None:
    server.engine.answer = lambda _: [[ord("a")], [EOS], [ord("b")], [10]]
    async with server.async_openai() as client:
        answer = await client.completions.create(
            model="tiny", prompt="a", extra_body={"ignore_eos": True, "stop_token_ids": [10]}
        )
    assert answer.choices[0].text == "ab"
    assert answer.choices[0].finish_reason == "stop"


async def test_defaults_of_max_tokens(server: Server) -> None:
    async with server.async_openai() as client:
        await client.completions.create(model="tiny", prompt=[1, 2, 3])
        await client.chat.completions.create(model="tiny", messages=MESSAGES)
    plain, chat = server.engine.submitted
    assert plain.sampling.max_tokens == 16
    assert chat.sampling.max_tokens == 512 - len(chat.prompt_token_ids)


async def test_bos_that_the_template_writes_is_not_doubled(server: Server) -> None:
    status, _ = await server.post(
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": MESSAGES,
            "chat_template_kwargs": {"prefix": ByteTokenizer.bos_token},
        },
    )
    assert status == 200
    assert list(server.engine.submitted[0].prompt_token_ids) == [BOS, *b"user:hi\nassistant:"]


async def test_content_parts_and_template_options(server: Server) -> None:
    async with server.async_openai() as client:
        await client.chat.completions.create(
            model="tiny",
            messages=[
                {"role": "developer", "content": "be brief"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
            ],
            extra_body={"add_generation_prompt": False, "chat_template_kwargs": {"suffix": "#"}},
        )
    prompt = bytes(server.engine.submitted[0].prompt_token_ids[1:]).decode()
    assert prompt == "system:be brief#\nuser:a\nb#\n"


async def test_null_is_the_same_as_absent(server: Server) -> None:
    names = (
        "stream stream_options n max_tokens max_completion_tokens stop stop_token_ids ignore_eos "
        "min_tokens seed temperature top_p top_k min_p repetition_penalty presence_penalty "
        "frequency_penalty logit_bias user logprobs top_logprobs tools tool_choice "
        "response_format functions audio modalities add_generation_prompt chat_template_kwargs"
    ).split()
    status, answer = await server.post(
        "/v1/chat/completions",
        {"model": "tiny", "messages": MESSAGES, **dict.fromkeys(names), "unknown": {"a": [1]}},
    )
    assert status == 200, answer
