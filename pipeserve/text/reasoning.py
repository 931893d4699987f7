"""Reasoning: tells what a model thinks aloud from its answer, as the text comes.

Belongs to one answer. Knows no tokens and no JSON.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeserve.text.markers import MarkerSearch


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """What a model writes around its thoughts."""

    opening: str
    closing: str


KNOWN_TAGS = (
    ReasoningTags("<think>", "</think>"),
    ReasoningTags("[THINK]", "[/THINK]"),
    ReasoningTags("<seed:think>", "</seed:think>"),
)
"""DeepSeek R1, Qwen 3, QwQ, SmolLM 3 and others; Magistral; Seed OSS."""


def find_tags(template: str) -> ReasoningTags | None:
    """The tags that a model's own template writes or removes."""
    return next((tags for tags in KNOWN_TAGS if tags.closing in template), None)


class ReasoningSplitter:
    """Takes the answer's text in parts; gives (thoughts, answer) in parts.

    Thoughts come first, at most once. Whitespace around the tags belongs to neither.
    """

    def __init__(self, tags: ReasoningTags, *, is_open: bool) -> None:
        """is_open: the prompt ended with the opening tag already."""
        self._tags = tags
        self._closing = MarkerSearch((tags.closing,))
        self._is_undecided = not is_open
        self._start = ""
        """Of an answer whose first words may still become the opening tag."""
        self.is_open = is_open
        """Whether the model is thinking."""
        self._spaces = ""
        """Whitespace that belongs to the thoughts only if more of them follow."""
        self._skips_spaces = True

    def push(self, text: str) -> tuple[str, str]:
        if self._is_undecided:
            text = self._decide(text)
        if not self.is_open:
            return "", self._answer(text)
        before, marker, after = self._closing.push(text)
        thoughts = self._thoughts(before)
        if marker is None:
            return thoughts, ""
        self.is_open = False
        self._skips_spaces = True
        return thoughts, self._answer(after)

    def finish(self) -> tuple[str, str]:
        """What was held back, now that no more text comes."""
        if self._is_undecided:
            return "", self._start
        return (self._thoughts(self._closing.rest()), "") if self.is_open else ("", "")

    def _decide(self, text: str) -> str:
        """Thoughts come at the very beginning, or there are none."""
        self._start += text
        begun = self._start.lstrip()
        if begun.startswith(self._tags.opening):
            self._is_undecided, self.is_open = False, True
            return begun.removeprefix(self._tags.opening)
        if self._tags.opening.startswith(begun):
            return ""
        self._is_undecided = self._skips_spaces = False
        return self._start

    def _thoughts(self, text: str) -> str:
        if self._skips_spaces:
            text = text.lstrip()
        if not text:
            return ""
        self._skips_spaces = False
        text = self._spaces + text
        stripped = text.rstrip()
        self._spaces = text[len(stripped) :]
        return stripped

    def _answer(self, text: str) -> str:
        if self._skips_spaces:
            text = text.lstrip()
            self._skips_spaces = not text
        return text
