"""TemplateFeatures: what a chat template can write, told from its source without running it.

Immutable; read once when the model is loaded. Knows nothing of requests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import jinja2
import jinja2.meta

from pipeserve.text.reasoning import ReasoningTags, find_tags
from pipeserve.text.tool_calls import ToolCallFormat, find_format

_MISSING_CONTENT = re.compile(r"content['\"\]]*\s+is\s+(not\s+)?none", re.IGNORECASE)
_ARGUMENTS_AS_JSON = re.compile(
    r"(arguments|function|tool_calls?)['\"\]\s]*(\|\s*(items|dictsort|tojson)|is\s+(mapping|string))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFeatures:
    """Kept with the template."""

    tools: bool
    """Whether it tells the model which tools there are."""
    tool_calls: bool
    """Whether it writes earlier calls of the chat."""
    arguments_as_objects: bool
    """Whether it turns the arguments of earlier calls to JSON itself; true, too, where it writes no
    calls, which become text before it."""
    content_may_be_none: bool
    """Whether it tells a message without content from one whose content is empty."""
    thinking_switch: bool
    """Whether its variable enable_thinking says if the model thinks first."""
    reasoning: ReasoningTags | None
    """What the model writes around its thoughts; None where it is not known to think."""
    tool_call_format: ToolCallFormat

    @classmethod
    def of(cls, source: str, environment: jinja2.Environment) -> TemplateFeatures:
        """Read a source that the environment can parse."""
        variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        has_tools, has_calls = "tools" in variables, "tool_calls" in source
        return cls(
            tools=has_tools,
            tool_calls=has_calls,
            arguments_as_objects=not has_calls or _ARGUMENTS_AS_JSON.search(source) is not None,
            content_may_be_none=_MISSING_CONTENT.search(source) is not None,
            thinking_switch="enable_thinking" in variables,
            reasoning=find_tags(source),
            tool_call_format=find_format(source if has_tools else ""),
        )
