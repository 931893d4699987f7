"""ToolCallParser: finds the calls in what a model writes, and gives their arguments as they come.

Belongs to one answer. Knows no tokens and no HTTP.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass

from pipeserve.text.call_reader import CallDelta, CallReader, Progress
from pipeserve.text.markers import MarkerSearch


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallFormat:
    """How a family of models writes calls: JSON objects with a name and arguments, and around
    them what this says."""

    name: str
    opening: str | None
    """What calls stand behind; None where an answer that begins with JSON is a call."""
    closing: str | None = None
    has_bare_names: bool = False
    """Whether NAME[ARGS]{...} is a call as well."""
    has_short_ids: bool = False
    """Whether templates take no ids of calls but those of nine letters and digits."""
    starts_anywhere: bool = True
    """Whether calls may follow other text; else they are the whole answer, opening or not."""


HERMES = ToolCallFormat(name="hermes", opening="<tool_call>", closing="</tool_call>")
"""Hermes, Qwen 2.5 and 3, SmolLM 3 and others."""
NEMOTRON = ToolCallFormat(name="nemotron", opening="<TOOLCALL>", closing="</TOOLCALL>")
PHI4 = ToolCallFormat(name="phi4", opening="<|tool_call|>", closing="<|/tool_call|>")
MISTRAL = ToolCallFormat(
    name="mistral", opening="[TOOL_CALLS]", has_bare_names=True, has_short_ids=True
)
LLAMA3 = ToolCallFormat(name="llama3", opening="<|python_tag|>", starts_anywhere=False)
JSON = ToolCallFormat(name="json", opening=None, starts_anywhere=False)
"""For a model whose template knows no tools, or writes them in no way that is known."""

_SPACES = " \t\r\n,;]"
"""What may stand between calls, and behind the last."""


def special_words(form: ToolCallFormat) -> tuple[str, ...]:
    """What the format is made of that may be control tokens, which other texts do not show."""
    words = [form.opening, form.closing]
    if form.has_bare_names:
        words += ["[ARGS]", "[CALL_ID]"]
    return tuple(word for word in words if word is not None)


def find_format(template: str) -> ToolCallFormat:
    """By the words that the model's own template writes earlier calls with."""
    for form in (MISTRAL, HERMES, NEMOTRON, PHI4):
        if form.opening is not None and form.opening in template:
            return form
    if "<|python_tag|>" in template or "<|eom_id|>" in template:
        return LLAMA3
    return JSON


class _Place(enum.Enum):
    START = enum.auto()
    """Nothing but whitespace yet, of an answer that may be a call without an opening."""
    TEXT = enum.auto()
    BETWEEN = enum.auto()
    """Behind an opening or a call: another call, or the end of the calls."""
    CALL = enum.auto()


class ToolCallParser:
    """Takes the answer's text in parts; gives (text, calls) in parts.

    What looks like a call and turns out to be none is text. Where no marker says that JSON is a
    call, it is one only if it names a known tool.
    """

    def __init__(self, form: ToolCallFormat, *, tool_names: Collection[str]) -> None:
        self._form = form
        self._names = None if form.starts_anywhere else frozenset(tool_names)
        markers = (form.opening,) if form.opening and form.starts_anywhere else ()
        self._search = MarkerSearch(markers)
        self._place = _Place.TEXT if form.starts_anywhere else _Place.START
        self._unread = ""
        """Text that cannot be told yet for what it is."""
        self._undecided = ""
        """What was read since text ended, and becomes text again if no call comes of it."""
        self._reader = CallReader(index=0, names=self._names)
        self._skips_spaces = False
        self.num_begun = 0
        self.num_complete = 0

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        out: list[str] = []
        deltas: list[CallDelta] = []
        while text:
            text = self._step(text, out, deltas)
        return "".join(out), deltas

    def finish(self) -> str:
        """The text that was held back, now that no more comes."""
        held = self._undecided + self._unread + self._search.rest()
        if self._place is _Place.BETWEEN and self.num_begun and not self._undecided:
            held = held.strip(_SPACES + "[")
            return "" if (self._form.closing or "").startswith(held) else held
        return held

    def _write(self, text: str, out: list[str]) -> None:
        """Whitespace behind a call is nobody's."""
        if self._skips_spaces:
            text = text.lstrip()
            self._skips_spaces = not text
        out.append(text)

    def _step(self, text: str, out: list[str], deltas: list[CallDelta]) -> str:
        """Read some of the text; what is left of it."""
        text, self._unread = self._unread + text, ""
        match self._place:
            case _Place.TEXT:
                return self._read_text(text, out)
            case _Place.START:
                return self._read_start(text)
            case _Place.BETWEEN:
                return self._read_between(text, out)
            case _Place.CALL:
                return self._read_call(text, out, deltas)

    def _read_text(self, text: str, out: list[str]) -> str:
        before, marker, after = self._search.push(text)
        self._write(before, out)
        if marker is not None:
            self._place, self._undecided = _Place.BETWEEN, marker
        return after

    def _read_start(self, text: str) -> str:
        begun = text.lstrip()
        opening = self._form.opening or "{"
        if opening.startswith(begun) and begun != opening:
            self._unread = text
            return ""
        if begun[0] == "[" and not begun[1:].strip():
            self._unread = text
            return ""
        is_list = begun[0] == "[" and begun[1:].lstrip()[0] == "{"
        if begun[0] == "{" or is_list or begun.startswith(opening):
            self._place = _Place.BETWEEN
        else:
            self._place = _Place.TEXT
        return text

    def _read_between(self, text: str, out: list[str]) -> str:
        rest = text.lstrip(_SPACES)
        for marker in filter(None, (self._form.opening, self._form.closing)):
            if rest.startswith(marker):
                return self._read_marker(marker, text, out)
            if marker.startswith(rest):
                self._unread = text
                return ""
        rest = rest.lstrip(_SPACES + "[")
        if not rest:
            self._unread = text
            return ""
        if rest[0] == "{" or (self._form.has_bare_names and (rest[0].isalnum() or rest[0] == "_")):
            self._place = _Place.CALL
            self._undecided += text[: len(text) - len(rest)]
            self._reader = CallReader(index=self.num_begun, names=self._names)
            return rest
        return self._give_up(text, out)

    def _read_marker(self, marker: str, text: str, out: list[str]) -> str:
        length = text.index(marker) + len(marker)
        is_opening = marker == self._form.opening
        if is_opening or self._undecided:
            self._undecided += text[:length]
        if is_opening:
            return text[length:]
        return self._give_up(text[length:], out)

    def _read_call(self, text: str, out: list[str], deltas: list[CallDelta]) -> str:
        progress, used = self._reader.push(text)
        self._undecided += text[:used]
        if progress is Progress.BROKEN and not self._reader.has_begun:
            return self._give_up(text[used:], out)
        delta = self._reader.take()
        if delta is not None:
            self.num_begun = delta.index + 1
            self._skips_spaces = True
            deltas.append(delta)
        if self._reader.has_begun:
            self._undecided = ""
        if progress is not Progress.READING:
            self._place = _Place.BETWEEN
            self.num_complete += progress is Progress.DONE
        return text[used:]

    def _give_up(self, text: str, out: list[str]) -> str:
        """What was taken for a call is text after all, and so is what follows."""
        self._write(self._undecided, out)
        self._place, self._undecided = _Place.TEXT, ""
        return text
