"""/tokenize, /detokenize, /apply-template and what /v1/models tells, in both peers' words."""

from __future__ import annotations

import dataclasses

import pytest

from pipeserve.server.model_facts import ModelFacts
from tests.server.conftest import TEMPLATE, Server
from tests.server.fakes import BOS, MARK

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"content": "hi"}, [104, 105]),
        ({"content": "hi", "add_special": True}, [BOS, 104, 105]),
        ({"prompt": "hi"}, [BOS, 104, 105]),
        ({"prompt": "hi", "add_special_tokens": False, "model": "tiny"}, [104, 105]),
        ({"content": ""}, []),
        (CHAT, [*b"user:hi\nassistant:"]),
        ({**CHAT, "add_generation_prompt": False}, [*b"user:hi\n"]),
    ],
)
async def test_tokenize(server: Server, body: dict[str, object], tokens: list[int]) -> None:
    status, answer = await server.post("/tokenize", body)
    assert status == 200
    assert answer == {"tokens": tokens, "count": len(tokens), "max_model_len": 512}


async def test_pieces_are_texts_or_bytes(server: Server) -> None:
    body = {"content": "aé", "with_pieces": True, "return_token_strs": True}
    _, answer = await server.post("/tokenize", body)
    assert answer["tokens"] == [
        {"id": 97, "piece": "a"},
        {"id": 0xC3, "piece": [0xC3]},
        {"id": 0xA9, "piece": [0xA9]},
    ]
    assert answer["token_strs"] == ["a", "\ufffd", "\ufffd"]


async def test_detokenize_shows_control_tokens(server: Server) -> None:
    _, answer = await server.post("/detokenize", {"tokens": [97, MARK, 98]})
    assert answer == {"content": "a<|mark|>b", "prompt": "a<|mark|>b"}


async def test_apply_template(server: Server) -> None:
    _, answer = await server.post(
        "/apply-template", {**CHAT, "chat_template_kwargs": {"prefix": ">"}}
    )
    assert answer == {"prompt": ">user:hi\nassistant:"}


async def test_tokenizer_info(server: Server) -> None:
    async with server.http.get(f"{server.url}/tokenizer_info") as response:
        info = await response.json()
    assert info == {
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "add_bos_token": True,
        "chat_template": TEMPLATE,
        "model_max_length": 512,
    }


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": "a", "prompt": "b"}, "content"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [259]}, "tokens"),
        ("/apply-template", {}, "messages"),
        ("/apply-template", {**CHAT, "model": "other"}, "model"),
    ],
)
async def test_refusals(server: Server, path: str, body: dict[str, object], param: str) -> None:
    status, answer = await server.post(path, body)
    assert status in (400, 404)
    assert answer["error"]["param"] == param  # type: ignore[index]


async def test_models_tell_facts_and_capabilities(server: Server) -> None:
    facts = ModelFacts(
        architecture="llama",
        quantisation="Q4_K_M",
        num_parameters=8,
        num_bytes=5,
        trained_context=4096,
    )
    card = dataclasses.replace(server.services.card, facts=facts)
    server.state.ready(dataclasses.replace(server.services, card=card))
    async with server.http.get(f"{server.url}/v1/models/tiny") as response:
        model = await response.json()
    assert model["max_model_len"] == 512
    assert model["meta"] == {
        "n_vocab": 259,
        "architecture": "llama",
        "quantisation": "Q4_K_M",
        "n_params": 8,
        "size": 5,
        "n_ctx_train": 4096,
        "capabilities": {
            "tools": False,
            "tool_call_format": "json",
            "reasoning": False,
            "thinking_switch": False,
            "infill": True,
        },
    }
