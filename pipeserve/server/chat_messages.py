"""The messages of a chat, with tool calls and their results, and how templates expect them.

Runs in the text executor. Knows OpenAI's JSON, no endpoint.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from pipeserve.server.body import Body, Ignored, Refused, kind_of_text
from pipeserve.text.template_features import TemplateFeatures

MAX_MESSAGES = 16_384
"""In a chat, and parts of a message: what is made of them holds up everybody, 4 us for each."""


class ContentPart(Body):
    """One part of a message; only text can be served."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[tuple[ContentPart, ...], Field(max_length=MAX_MESSAGES), Tag("<list>")],
    Discriminator(kind_of_text),
]


class CalledFunction(Body):
    name: str
    arguments: str
    """A JSON object, as text."""


class ToolCall(Body):
    """A call that the model made earlier in the chat."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Ignored = None

    def for_template(self, *, arguments_as_objects: bool) -> dict[str, Any]:
        """arguments_as_objects: as the template's `tojson` needs them; else the text as it is."""
        arguments: Any = self.function.arguments
        if arguments_as_objects:
            try:
                arguments = json.loads(arguments)
            except ValueError:  # the model wrote it, and may have been cut off
                pass
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class PlainMessage(Body):
    """A message of anyone but the model, whose role is here for the refusal of unknown ones;
    `tool` brings the result of a call."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The content as one string, `developer` as `system`."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": text_of(self.content)}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class AssistantMessage(Body):
    """What the model said and called; content may be missing beside calls."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    reasoning_content: str | None = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: Annotated[Any, Refused("leave it out")] = None
    function_call: Annotated[Any, Refused("send tool_calls")] = None

    def for_template(self, features: TemplateFeatures) -> dict[str, Any]:
        """As a template with these features takes it."""
        is_missing = self.content is None and features.content_may_be_none
        content = None if is_missing else text_of(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                call.for_template(arguments_as_objects=features.arguments_as_objects)
                for call in self.tool_calls
            ]
        return message


def text_of(content: str | tuple[ContentPart, ...] | None) -> str:
    """The content as one string."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def _author(value: object) -> str:
    is_assistant = isinstance(value, dict) and value.get("role") == "assistant"
    return "<assistant>" if is_assistant else "<plain>"


ChatMessage = Annotated[
    Annotated[AssistantMessage, Tag("<assistant>")] | Annotated[PlainMessage, Tag("<plain>")],
    Discriminator(_author),
]
