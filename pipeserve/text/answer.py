"""AnswerForm and AnswerParser: tell thoughts, text and tool calls of an answer apart as it comes.

A parser belongs to one answer. Knows no tokens and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeserve.text.call_reader import CallDelta
from pipeserve.text.reasoning import ReasoningSplitter, ReasoningTags
from pipeserve.text.tool_calls import ToolCallFormat, ToolCallParser


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerParts:
    """What is new of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.calls)

    @staticmethod
    def joined(parts: Sequence[AnswerParts]) -> AnswerParts:
        """One after another."""
        return AnswerParts(
            text="".join(part.text for part in parts),
            reasoning="".join(part.reasoning for part in parts),
            calls=tuple(call for part in parts for call in part.calls),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """What the answers of one request may hold besides text."""

    reasoning: ReasoningTags | None = None
    """None: thoughts are not told from text."""
    is_reasoning_open: bool = False
    """Whether the prompt ends with the opening tag, so that answers begin with thoughts, told from
    text or not."""
    shows_reasoning: bool = True
    tool_calls: ToolCallFormat | None = None
    """None: no calls."""
    tool_names: frozenset[str] = frozenset()
    max_calls: int | None = None
    """An answer is complete with so many."""

    def new_parser(self) -> AnswerParser | None:
        """For one answer; None where it is nothing but text."""
        if self.reasoning is None and self.tool_calls is None:
            return None
        reasoning = tool_calls = None
        if self.reasoning is not None:
            reasoning = ReasoningSplitter(self.reasoning, is_open=self.is_reasoning_open)
        if self.tool_calls is not None:
            tool_calls = ToolCallParser(self.tool_calls, tool_names=self.tool_names)
        return AnswerParser(
            reasoning=reasoning,
            tool_calls=tool_calls,
            max_calls=self.max_calls,
            shows_reasoning=self.shows_reasoning,
        )


class AnswerParser:
    """Thoughts first, then text with calls, each where the model can write it."""

    def __init__(
        self,
        *,
        reasoning: ReasoningSplitter | None,
        tool_calls: ToolCallParser | None,
        max_calls: int | None = None,
        shows_reasoning: bool = True,
    ) -> None:
        """max_calls, shows_reasoning: see AnswerForm."""
        self._reasoning = reasoning
        self._tool_calls = tool_calls
        self._max_calls = max_calls
        self._shows_reasoning = shows_reasoning

    @property
    def is_reasoning(self) -> bool:
        """Whether the model is thinking."""
        return self._reasoning is not None and self._reasoning.is_open

    @property
    def has_calls(self) -> bool:
        return self._tool_calls is not None and self._tool_calls.num_begun > 0

    @property
    def is_complete(self) -> bool:
        """Whether nothing that follows is wanted."""
        most, calls = self._max_calls, self._tool_calls
        return most is not None and calls is not None and calls.num_complete >= most

    def push(self, text: str) -> AnswerParts:
        thoughts = ""
        if self._reasoning is not None:
            thoughts, text = self._reasoning.push(text)
        return self._with_calls(thoughts, text)

    def finish(self) -> AnswerParts:
        """What was held back; call it once, after the last text."""
        thoughts = text = ""
        if self._reasoning is not None:
            thoughts, text = self._reasoning.finish()
        parts = self._with_calls(thoughts, text)
        if self._tool_calls is None:
            return parts
        rest = self._tool_calls.finish()
        return AnswerParts(text=parts.text + rest, reasoning=parts.reasoning, calls=parts.calls)

    def _with_calls(self, thoughts: str, text: str) -> AnswerParts:
        if not self._shows_reasoning:
            thoughts = ""
        if self._tool_calls is None:
            return AnswerParts(text=text, reasoning=thoughts)
        text, calls = self._tool_calls.push(text)
        if self._max_calls is not None:
            calls = [call for call in calls if call.index < self._max_calls]
        return AnswerParts(text=text, reasoning=thoughts, calls=tuple(calls))
