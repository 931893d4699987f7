"""Tools that a chat offers to the model, and which of them it may call.

Runs in the text executor. Knows OpenAI's JSON, not how models write calls.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from pipeserve.server.body import Body, kind_of_text

MAX_TOOLS = 4096
FunctionName = Annotated[str, Field(min_length=1, max_length=200)]


class FunctionDefinition(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None


class FunctionTool(Body):
    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class FunctionReference(Body):
    name: FunctionName


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionReference


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: tuple[NamedTool, ...]


class AllowedToolsChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind_of_choice(value: object) -> str:
    if isinstance(value, dict):
        return "<allowed>" if value.get("type") == "allowed_tools" else "<named>"
    return kind_of_text(value)


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")]
    | Annotated[NamedTool, Tag("<named>")]
    | Annotated[NamedTool, Tag("<list>")]
    | Annotated[AllowedToolsChoice, Tag("<allowed>")],
    Discriminator(_kind_of_choice),
]
"""What is neither a string nor an object is read, and refused, as the object."""
