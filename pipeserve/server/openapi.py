"""The OpenAPI document: request bodies from the models that validate them.

Pure functions; nothing in here runs while requests are served.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from pipeserve import __version__
from pipeserve.server.body import Body
from pipeserve.server.chat_requests import ChatCompletionRequest
from pipeserve.server.completion_requests import CompletionRequest
from pipeserve.server.text_requests import ApplyTemplateRequest, DetokenizeRequest, TokenizeRequest

Json = dict[str, Any]

_POSTS: Mapping[str, tuple[type[Body], str, str]] = {
    "/v1/chat/completions": (ChatCompletionRequest, "ChatCompletion", "Answer a chat"),
    "/v1/completions": (CompletionRequest, "Completion", "Continue a text"),
    "/tokenize": (TokenizeRequest, "Tokens", "Token ids of a text or a chat"),
    "/detokenize": (DetokenizeRequest, "Text", "Text of token ids"),
    "/apply-template": (ApplyTemplateRequest, "Prompt", "The prompt that a chat becomes"),
}
"""Path -> body, schema of the answer, summary."""


def openapi_document() -> str:
    """OpenAPI 3.1 as JSON."""
    bodies = [(body, "validation") for body, _, _ in _POSTS.values()]
    _, definitions = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    document = {
        "openapi": "3.1.0",
        "info": {"title": "pipeserve", "version": __version__},
        "paths": {
            **{path: {"post": _post(*rest)} for path, rest in _POSTS.items()},
            **_gets(),
        },
        "components": {
            "schemas": {**definitions["$defs"], **_ANSWERS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
    return json.dumps(document, separators=(",", ":"))


def _post(body: type[Body], answer: str, summary: str) -> Json:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json_of(body.__name__)},
        "responses": _responses(answer, streams="Completion" in answer),
    }


def _gets() -> Json:
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    model = {"summary": "One model", "parameters": [name], "responses": _responses("Model")}
    health = {
        "200": {"description": "Requests are taken.", "content": _json_of("Health")},
        "503": {"description": "They are not.", "content": _json_of("Health")},
        "4XX": {"description": "Refused.", "content": _json_of("Error")},
    }
    text: Json = {"text/plain": {"schema": {"type": "string"}}}
    metrics = {
        "200": {"description": "Prometheus metrics.", "content": text},
        "4XX": {"description": "Refused.", "content": _json_of("Error")},
    }
    tokenizer = {
        "summary": "Special tokens and chat template",
        "responses": _responses("TokenizerInfo"),
    }
    return {
        "/tokenizer_info": {"get": tokenizer},
        "/v1/models": {"get": {"summary": "What is served", "responses": _responses("ModelList")}},
        "/v1/models/{model}": {"get": model},
        "/health": {"get": {"summary": "Whether requests are taken", "responses": health}},
        "/metrics": {"get": {"summary": "Counters and gauges", "responses": metrics}},
    }


def _json_of(schema: str) -> Json:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _responses(answer: str, *, streams: bool = False) -> Json:
    content = _json_of(answer)
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "200": {"description": "The answer.", "content": content},
        "4XX": {"description": "The request is at fault.", "content": _json_of("Error")},
        "5XX": {"description": "The server is, or not ready.", "content": _json_of("Error")},
    }


def _object(**properties: Json) -> Json:
    """With all of these members, and perhaps others."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _list_of(items: Json) -> Json:
    return {"type": "array", "items": items}


_TEXT: Json = {"type": "string"}
_NUMBER: Json = {"type": "integer"}
_MAYBE_TEXT: Json = {"type": ["string", "null"]}
_USAGE = _object(prompt_tokens=_NUMBER, completion_tokens=_NUMBER, total_tokens=_NUMBER)
_HEAD = {"id": _TEXT, "object": _TEXT, "created": _NUMBER, "model": _TEXT, "usage": _USAGE}
_MESSAGE = _object(role=_TEXT, content=_MAYBE_TEXT)
_CHAT_CHOICE = _object(index=_NUMBER, message=_MESSAGE, finish_reason=_TEXT)
_CHOICE = _object(index=_NUMBER, text=_TEXT, finish_reason=_TEXT)
_MODEL = _object(id=_TEXT, object=_TEXT, created=_NUMBER, owned_by=_TEXT, max_model_len=_NUMBER)

_ANSWERS: Json = {
    "ChatCompletion": _object(**_HEAD, choices=_list_of(_CHAT_CHOICE)),
    "Completion": _object(**_HEAD, choices=_list_of(_CHOICE)),
    "Tokens": _object(tokens={"type": "array"}, count=_NUMBER, max_model_len=_NUMBER),
    "Text": _object(content=_TEXT, prompt=_TEXT),
    "Prompt": _object(prompt=_TEXT),
    "TokenizerInfo": _object(
        bos_token=_MAYBE_TEXT,
        eos_token=_MAYBE_TEXT,
        add_bos_token={"type": "boolean"},
        chat_template=_TEXT,
        model_max_length=_NUMBER,
    ),
    "Model": _MODEL,
    "ModelList": _object(object=_TEXT, data=_list_of(_MODEL)),
    "Health": _object(status=_TEXT, reason=_TEXT, detail=_TEXT),
    "Error": _object(error=_object(message=_TEXT, type=_TEXT, param=_MAYBE_TEXT, code=_MAYBE_TEXT)),
}
"""What answers have in common with each other, whatever was asked for."""
