"""What lm-evaluation-harness asks the daemon, and that its scores are those of transformers.

The requests are the very ones that `make lm-eval ARGS="--record tests/e2e/lm_eval_requests.json"`
saw the harness make: loglikelihoods of choices and whole texts, greedy texts and chats.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.e2e.daemon_process import DaemonProcess, daemon

REQUESTS = json.loads(Path(__file__).with_name("lm_eval_requests.json").read_text())
SCORED = [each["body"] for each in REQUESTS if each["body"].get("echo")]
GREEDY = [each for each in REQUESTS if not each["body"].get("echo")]
TOLERANCE = 0.01
"""Of the log-likelihood of a whole text, in nats."""
MARGIN = 1e-3
"""Between logits of which rounding may turn over the order."""


@pytest.fixture(scope="module")
def served(demo_model_path: object) -> Iterator[DaemonProcess]:
    with daemon() as running:
        yield running


@pytest.fixture
async def http(served: DaemonProcess) -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=100)
    async with aiohttp.ClientSession(served.url, timeout=timeout) as session:
        yield session


@pytest.fixture(scope="module")
def reference(demo_model_path: Path) -> PreTrainedModel:
    """transformers' own reading of the file, dequantised to float32."""
    return AutoModelForCausalLM.from_pretrained(
        demo_model_path.parent, gguf_file=demo_model_path.name, dtype=torch.float32
    ).eval()


def reference_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[tokens, V]: at [i] those of the token behind the first i + 1."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


async def post(http: aiohttp.ClientSession, path: str, body: Any) -> Any:
    async with http.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def test_loglikelihoods(http: aiohttp.ClientSession, reference: PreTrainedModel) -> None:
    bodies = SCORED[::3]
    answers = await asyncio.gather(*(post(http, "/v1/completions", body) for body in bodies))
    for body, answer in zip(bodies, answers, strict=True):
        (ids,) = body["prompt"]
        logprobs = answer["choices"][0]["logprobs"]
        scores, tops = logprobs["token_logprobs"], logprobs["top_logprobs"]
        assert len(scores) == len(ids) + 1, "one more is generated, which the harness takes away"
        expected = torch.log_softmax(reference_logits(reference, ids)[:-1], dim=1)
        theirs = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert sum(scores[1:-1]) == pytest.approx(float(theirs.sum()), abs=TOLERANCE)
        best, other = expected.topk(2, dim=1).values.T
        for at in (best - other > MARGIN).nonzero()[:, 0].tolist():
            is_greedy = scores[at + 1] == max(tops[at + 1].values())
            assert is_greedy == (int(expected[at].argmax()) == ids[at + 1])


async def test_greedy_texts_and_chats(
    http: aiohttp.ClientSession, reference: PreTrainedModel
) -> None:
    num_decided = 0
    for request in GREEDY[::4]:
        body = {**request["body"], "stop": None, "logprobs": 1}
        if "messages" in body:
            told = await post(http, "/tokenize", {"messages": body["messages"]})
            (ids,), path = [told["tokens"]], "/v1/completions"
            body = {**body, "prompt": [ids]}
            del body["messages"]
        else:
            (ids,), path = body["prompt"], request["path"]
        whole = await post(http, request["path"], request["body"])
        answer = await post(http, path, body)
        text, tokens = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]["tokens"]
        cut = min(text.find(stop) % (len(text) + 1) for stop in request["body"]["stop"])
        choice = whole["choices"][0]
        assert (choice["text"] if "text" in choice else choice["message"]["content"]) == text[:cut]
        told = await post(http, "/tokenize", {"content": "".join(tokens)})
        output = told["tokens"]
        assert len(output) == len(tokens)
        logits = reference_logits(reference, [*ids, *output])[len(ids) - 1 : -1]
        best, other = logits.topk(2, dim=1).values.T
        for at in (best - other > MARGIN).nonzero()[:, 0].tolist():
            assert int(logits[at].argmax()) == output[at]
            num_decided += 1
    assert num_decided > 40
