"""The body of /v1/chat/completions.

Runs in the text executor.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeserve.core.sampling import MAX_LOGPROBS
from pipeserve.errors import InvalidParameterError
from pipeserve.server.body import Ignored, Refused
from pipeserve.server.chat_messages import MAX_MESSAGES, AssistantMessage, ChatMessage
from pipeserve.server.requests import GenerationRequest
from pipeserve.server.thinking import ThinkingRequest
from pipeserve.server.tools import (
    MAX_TOOLS,
    AllowedToolsChoice,
    FunctionTool,
    NamedTool,
    ToolChoice,
)
from pipeserve.text.template_features import TemplateFeatures

_LEAVE_OUT = "leave it out"
_TEXT_VERBOSITY = 'leave it out or send "medium"; say in a message how long answers should be'


class ChatPrompt(ThinkingRequest):
    """What a chat template makes a prompt of."""

    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[tuple[FunctionTool, ...], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the model's chat template."""
    reasoning_effort: Annotated[str, Field(max_length=20)] | None = None
    """Given to the template; "none" also sets its variable enable_thinking to false."""

    @model_validator(mode="after")
    def _tool_choice_needs_tools(self) -> ChatPrompt:
        if self.tool_choice in (None, "none"):
            return self
        if not self.tools:
            raise InvalidParameterError(
                "tool_choice is given but tools is not; send tools or leave tool_choice out",
                param="tool_choice",
            )
        known = {tool.function.name for tool in self.tools}
        for name in self._chosen_names:
            if name not in known:
                raise InvalidParameterError(
                    f"tool_choice names {name[:60]!r}, which is not among tools; name one of them",
                    param="tool_choice",
                )
        return self

    @property
    def _chosen_names(self) -> tuple[str, ...]:
        match self.tool_choice:
            case NamedTool(function=function):
                return (function.name,)
            case AllowedToolsChoice(allowed_tools=allowed):
                return tuple(tool.function.name for tool in allowed.tools)
        return ()

    @property
    def forces_a_call(self) -> bool:
        """Whether tool_choice demands a call instead of allowing one."""
        choice = self.tool_choice
        if isinstance(choice, AllowedToolsChoice):
            return choice.allowed_tools.mode == "required"
        return choice == "required" or isinstance(choice, NamedTool)

    @property
    def offered_tools(self) -> tuple[FunctionTool, ...]:
        """The tools that the model may call."""
        if self.tool_choice == "none":
            return ()
        tools = self.tools or ()
        if isinstance(self.tool_choice, AllowedToolsChoice | NamedTool):
            tools = tuple(tool for tool in tools if tool.function.name in self._chosen_names)
        return tools

    @property
    def names_the_call(self) -> bool:
        """Whether tool_choice is one function, of which there is to be one call."""
        return isinstance(self.tool_choice, NamedTool)

    @property
    def template_variables(self) -> dict[str, Any]:
        """Beside messages and tools."""
        given: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            given["reasoning_effort"] = self.reasoning_effort
        if self.most_thoughts is not None:
            given["thinking_budget"] = self.most_thoughts
        if self.reasoning_effort == "none" or self.most_thoughts == 0:
            given["enable_thinking"] = False
        return {**given, **(self.chat_template_kwargs or {})}

    def messages_for_template(self, features: TemplateFeatures) -> list[dict[str, Any]]:
        """As a template with these features takes them."""
        return [
            message.for_template(features)
            if isinstance(message, AssistantMessage)
            else message.for_template()
            for message in self.messages
        ]


class ChatCompletionRequest(ChatPrompt, GenerationRequest):
    """POST /v1/chat/completions."""

    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of max_tokens; wins where both are given."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    parallel_tool_calls: bool | None = None
    """false: the answer ends after its first call."""
    include_reasoning: bool | None = None
    """false: what the model thought is left out of the answer."""
    reasoning_format: Literal["auto", "none", "deepseek"] | None = None
    """none: what the model thought stays in content; else it goes to reasoning_content."""

    functions: Annotated[Any, Refused("send tools", [])] = None
    function_call: Annotated[Any, Refused("send tool_choice", "none")] = None
    modalities: Annotated[Any, Refused('leave it out or send ["text"]', ["text"])] = None
    audio: Annotated[Any, Refused(_LEAVE_OUT)] = None
    web_search_options: Annotated[Any, Refused(_LEAVE_OUT)] = None
    moderation: Annotated[Any, Refused(_LEAVE_OUT)] = None
    verbosity: Annotated[Any, Refused(_TEXT_VERBOSITY, "medium")] = None

    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: Ignored = None
    store: Ignored = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidParameterError(
                f"top_logprobs is {self.top_logprobs} but logprobs is not true; set logprobs to "
                "true or leave top_logprobs out",
                param="top_logprobs",
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
