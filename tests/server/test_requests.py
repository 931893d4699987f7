"""Parsing of request bodies: whatever the JSON, a request or a named refusal."""

from __future__ import annotations

import json
import math
from typing import get_type_hints

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai.types import chat, completion_create_params

from pipeserve.errors import InvalidParameterError
from pipeserve.server.body import Body, parse
from pipeserve.server.chat_requests import ChatCompletionRequest
from pipeserve.server.completion_requests import CompletionRequest

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "1"]), inner)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": "a"}]}),
        (CompletionRequest, {"prompt": "a"}),
    ],
)
@given(data=st.data())
def test_any_value_in_any_field_parses_or_is_refused_by_name(
    kind: type[ChatCompletionRequest] | type[CompletionRequest],
    base: dict[str, object],
    data: st.DataObject,
) -> None:
    field = data.draw(st.sampled_from(sorted(kind.model_fields)))
    value = data.draw(VALUES)
    body = json.dumps({"model": "tiny", **base, field: value}).encode()
    try:
        request = parse(body, kind)
        sampling = request.sampling(
            seed=0,
            max_tokens=10,
            vocab_size=100,
            eos_token_ids=frozenset({2}),
            breaker_groups=lambda _: (),
        )
    except InvalidParameterError as error:
        known = error.param is None or error.param.startswith(field)
        assert known or field in ("stream", "logprobs", "min_tokens"), error
        return
    assert all(0 <= seed < 2**63 for seed in request.choice_seeds())
    assert math.isfinite(sampling.temperature)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        (
            ChatCompletionRequest,
            (
                chat.completion_create_params.CompletionCreateParamsNonStreaming,
                chat.completion_create_params.CompletionCreateParamsStreaming,
            ),
        ),
        (
            CompletionRequest,
            (
                completion_create_params.CompletionCreateParamsNonStreaming,
                completion_create_params.CompletionCreateParamsStreaming,
            ),
        ),
    ],
)
def test_every_parameter_of_the_openai_package_is_known(
    kind: type[Body], parameters: tuple[type, ...]
) -> None:
    known = {name for each in parameters for name in get_type_hints(each)}
    assert len(known) > 15
    assert known <= set(kind.model_fields)


@given(body=st.binary(max_size=40))
@example(body=b'{"model": "\\ud83d\\ude00", "prompt": "\\ud83d\\ude00"}')
def test_any_bytes(body: bytes) -> None:
    try:
        request = parse(body, CompletionRequest)
    except InvalidParameterError as error:
        assert str(error)
    else:
        assert request.prompts == ("😀",)


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(InvalidParameterError) as refusal:
        parse(json.dumps({"model": ["secret" * 100], "prompt": "a"}).encode(), CompletionRequest)
    assert len(str(refusal.value)) < 120
