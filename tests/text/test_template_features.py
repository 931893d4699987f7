"""What a template's source says it can do, on excerpts in the manner of known models."""

from __future__ import annotations

import pytest

from pipeserve.text.chat_template import CHATML, PLAIN, ChatTemplate
from pipeserve.text.template_features import TemplateFeatures
from pipeserve.text.tool_calls import HERMES, JSON, LLAMA3, MISTRAL


def features(source: str) -> TemplateFeatures:
    return ChatTemplate(source, bos_token="", eos_token="").features


@pytest.mark.parametrize("source", [CHATML, PLAIN])
def test_plain_templates_can_do_nothing_more(source: str) -> None:
    found = features(source)
    assert not (found.tools or found.tool_calls or found.thinking_switch)
    assert found.reasoning is None
    assert found.tool_call_format is JSON


@pytest.mark.parametrize(
    ("source", "form", "as_objects"),
    [
        (
            (
                "{% if tools %}x{% endif %}{% for m in messages %}{% for c in m.tool_calls %}"
                "<tool_call>{{ c.arguments | tojson }}</tool_call>{% endfor %}{% endfor %}"
            ),
            HERMES,
            True,
        ),
        (
            (
                "{% if tools is defined %}x{% endif %}{% for m in messages %}[TOOL_CALLS]"
                "{% for c in m['tool_calls'] %}{{ c['function']|tojson }}{% endfor %}{% endfor %}"
            ),
            MISTRAL,
            True,
        ),
        (
            (
                "{% if tools %}{{ '<|python_tag|>' }}{% endif %}{% for m in messages %}"
                "{% if 'tool_calls' in m %}{{ m.tool_calls[0].function.arguments | tojson }}"
                "{% endif %}{% endfor %}"
            ),
            LLAMA3,
            True,
        ),
        (
            (
                "{% if tools %}x{% endif %}{% for m in messages %}{% for c in m.tool_calls %}"
                "{{ c['function']['name'] + c['function']['arguments'] }}{% endfor %}{% endfor %}"
            ),
            JSON,
            False,
        ),
    ],
)
def test_tools_and_how_calls_are_written(source: str, form: object, as_objects: bool) -> None:
    found = features(source)
    assert found.tools
    assert found.tool_calls
    assert found.tool_call_format is form
    assert found.arguments_as_objects is as_objects


def test_tools_that_a_template_sets_itself_where_there_are_none() -> None:
    assert features(
        "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}"
    ).tools


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if message['content'] is not none %}x{% endif %}", True),
        ("{% if message.content is none %}x{% endif %}", True),
        ("{{ message['content'] + eos_token }}", False),
    ],
)
def test_content_that_may_be_missing(source: str, expected: bool) -> None:
    assert features(source).content_may_be_none is expected


def test_thinking() -> None:
    found = features("{% if enable_thinking is false %}<think>\n\n</think>{% endif %}")
    assert found.thinking_switch
    assert found.reasoning is not None
    assert found.reasoning.closing == "</think>"
    assert not features("{% set enable_thinking = 1 %}{{ enable_thinking }}").thinking_switch
