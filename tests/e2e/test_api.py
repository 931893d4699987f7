"""The demo model through the whole API: scores of prompts, choices, tokenising, what is served."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import openai
import pytest

from tests.e2e.daemon_process import DaemonProcess, daemon

TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def served(demo_model_path: object) -> Iterator[DaemonProcess]:
    with daemon() as running:
        yield running


@pytest.fixture
def client(served: DaemonProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        yield client


def test_an_echoed_text_has_the_scores_that_it_had_when_it_was_generated(
    client: openai.OpenAI,
) -> None:
    """As lm-evaluation-harness asks for loglikelihoods: with echo, for one token."""
    generated = client.completions.create(
        model="demo", prompt=TEXT, temperature=0, max_tokens=8, logprobs=3
    ).choices[0]
    echoed = client.completions.create(
        model="demo", prompt=TEXT + generated.text, temperature=0, max_tokens=1, logprobs=3,
        echo=True,
    ).choices[0]  # fmt: skip
    alone = client.completions.create(
        model="demo", prompt=TEXT + generated.text, max_tokens=0, logprobs=3, echo=True
    ).choices[0]
    assert generated.logprobs is not None
    assert echoed.logprobs is not None
    assert alone.logprobs is not None
    assert echoed.text.startswith(TEXT + generated.text)
    assert alone.text == TEXT + generated.text
    tokens, scores = echoed.logprobs.tokens, echoed.logprobs.token_logprobs
    assert tokens is not None and scores is not None
    assert scores[0] is None
    assert tokens[-9:-1] == generated.logprobs.tokens
    assert scores[-9:-1] == pytest.approx(generated.logprobs.token_logprobs, abs=1e-3)
    assert alone.logprobs.token_logprobs == pytest.approx(scores[:-1], abs=1e-3)
    for score, top in zip(scores[-9:-1], (echoed.logprobs.top_logprobs or [])[-9:-1], strict=True):
        assert score == max(top.values()), "greedy, and so told as such"


def test_tokens_templates_and_models(served: DaemonProcess) -> None:
    def post(path: str, **body: object) -> dict[str, object]:
        answer = httpx2.post(f"{served.url}{path}", json=body, timeout=20)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    tokens = post("/tokenize", content=TEXT)["tokens"]
    assert post("/detokenize", tokens=tokens)["content"] == TEXT
    messages = [{"role": "user", "content": "hi"}]
    prompt = post("/apply-template", messages=messages)["prompt"]
    assert isinstance(prompt, str)
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    counted = post("/tokenize", messages=messages)["count"]
    assert counted == post("/tokenize", content=prompt)["count"]
    (model,) = httpx2.get(f"{served.url}/v1/models", timeout=20).json()["data"]
    meta = model["meta"]
    assert (meta["architecture"], meta["quantisation"]) == ("llama", "Q4_1")
    assert meta["n_params"] == 134_515_008
    assert meta["size"] == 98_362_432
    assert meta["n_ctx_train"] == 8192


def test_tools_reach_a_model_whose_template_has_none(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "What time is it?"}],
        tools=[{"type": "function", "function": {"name": "get_time"}}],
        temperature=0,
        max_tokens=30,
    )
    plain = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "What time is it?"}],
        temperature=0,
        max_tokens=1,
    )
    assert answer.usage is not None and plain.usage is not None
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens + 50
    message = answer.choices[0].message
    assert message.content or message.tool_calls
