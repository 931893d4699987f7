"""The OpenAPI document, and schemathesis with bodies made from it: no 500, no hang, no surprise."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from pipeserve.config import Config
from pipeserve.server.app import build_app
from pipeserve.server.chat_requests import ChatCompletionRequest
from pipeserve.server.completion_requests import CompletionRequest
from pipeserve.server.openapi import openapi_document
from pipeserve.server.options import LiveOptions
from pipeserve.server.state import AppState
from tests.server.conftest import Server

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
PATHS = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/apply-template": "POST",
    "/tokenizer_info": "GET",
    "/v1/models": "GET",
    "/v1/models/{model}": "GET",
    "/health": "GET",
    "/metrics": "GET",
}
NUM_EXAMPLES = 12


@pytest.fixture
async def endless(server: Server) -> AsyncIterator[Server]:
    """Every sequence goes on to its max_tokens."""
    server.engine.answer = lambda submit: [[ord("a")] * submit.sampling.max_tokens]
    yield server


def attack(url: str, path: str, mode: GenerationMode) -> int:
    """Send bodies that fit the schema, or that do not; how many were answered with 200."""
    schema = schemathesis.openapi.from_dict(json.loads(openapi_document()))
    operation = schema[path][PATHS[path]]
    num_answered = 0

    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        nonlocal num_answered
        if isinstance(case.body, dict):
            if isinstance(case.body.get("model"), str):
                case.body["model"] = "tiny"  # no further than the name otherwise
            case.body.pop("timeout", None)  # too short a one is answered with 504
        response = case.call(base_url=url, timeout=10)
        case.validate_response(response, checks=CHECKS)
        num_answered += response.status_code == 200

    send()
    return num_answered


@pytest.mark.parametrize("path", PATHS)
async def test_bodies_that_fit_the_schema(endless: Server, path: str) -> None:
    num_answered = await asyncio.to_thread(attack, endless.url, path, GenerationMode.POSITIVE)
    assert num_answered > 0 or path == "/v1/models/{model}"


@pytest.mark.parametrize("path", [path for path in PATHS if PATHS[path] == "POST"])
async def test_bodies_that_do_not(endless: Server, path: str) -> None:
    await asyncio.to_thread(attack, endless.url, path, GenerationMode.NEGATIVE)


async def test_the_document_is_served_and_holds_every_route_and_field(server: Server) -> None:
    async with server.http.get(f"{server.url}/openapi.json") as response:
        document = await response.json()
    assert set(document["paths"]) == set(PATHS)
    app = build_app(AppState(), LiveOptions(Config()))
    routes = {resource.canonical for resource in app.router.resources()}
    assert routes == {*PATHS, "/openapi.json"}
    schemas = document["components"]["schemas"]
    for body in (ChatCompletionRequest, CompletionRequest):
        assert set(schemas[body.__name__]["properties"]) == set(body.model_fields)
    assert (
        "send tools" in schemas["ChatCompletionRequest"]["properties"]["functions"]["description"]
    )
