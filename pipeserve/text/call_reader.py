"""CallReader: reads one call, letter by letter, and gives its arguments before they are complete.

Belongs to one answer. Knows no formats around calls.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Collection
from dataclasses import dataclass

_NAME_KEYS = frozenset({"name", "function"})
_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
_BARE_NAME = re.compile(r"([\w.-]{1,200})(?:\[CALL_ID\][^\[]{0,100})?(?:\[ARGS\])?\s*")
_KEYS_BEFORE_NAME = frozenset({(), ("type",), ("function",), ("type", "function")})
"""What may stand before the name of a call that no word marks as one."""
_MAX_HEAD = 400
"""Characters of a bare name and what stands between it and its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDelta:
    """What is new of one call."""

    index: int
    """Of the call within the answer."""
    name: str | None
    """Set in the first delta of a call."""
    arguments: str
    """The next piece of a JSON object's text."""


class Progress(enum.Enum):
    READING = enum.auto()
    DONE = enum.auto()
    BROKEN = enum.auto()
    """Not a call, or not a known tool's, or no JSON."""


class _State(enum.Enum):
    HEAD = enum.auto()
    KEY_OR_END = enum.auto()
    KEY = enum.auto()
    COLON = enum.auto()
    VALUE_START = enum.auto()
    VALUE = enum.auto()
    AFTER_VALUE = enum.auto()


class CallReader:
    """Reads {"name": ..., "arguments": {...}}, in either order and also inside
    {"function": {...}}, or NAME[ARGS]{...}."""

    def __init__(self, *, index: int, names: Collection[str] | None) -> None:
        """names: the only ones that make a call, and that in one of the usual forms; None takes
        any name and any order of keys."""
        self.index = index
        self._names = names
        self._state = _State.HEAD
        self._head = ""
        self._nesting = 0
        """Objects that keys are read from."""
        self._key = ""
        self._keys: tuple[str, ...] = ()
        """Those that were read before the name."""
        self._value: list[str] = []
        self._value_depth = 0
        self._is_streamed = False
        """Whether the value is the arguments, given out as it comes."""
        self._is_quoted = False
        self._is_escaped = False
        self._name: str | None = None
        self._is_announced = False
        self._has_arguments = False
        self._new_arguments: list[str] = []

    @property
    def has_begun(self) -> bool:
        """Whether the name is known, so that it is a call for sure."""
        return self._name is not None

    def push(self, text: str) -> tuple[Progress, int]:
        """Take more text; how far the call is, and how many letters belong to it."""
        for used, letter in enumerate(text):
            progress = self._read(letter)
            if progress is not Progress.READING:
                return progress, used + (progress is Progress.DONE)
        return Progress.READING, len(text)

    def take(self) -> CallDelta | None:
        """What is new and can be given out."""
        if self._name is None or (self._is_announced and not self._new_arguments):
            return None
        arguments = "".join(self._new_arguments)
        self._new_arguments.clear()
        name = None if self._is_announced else self._name
        self._is_announced = True
        return CallDelta(index=self.index, name=name, arguments=arguments)

    def _read(self, letter: str) -> Progress:
        match self._state:
            case _State.HEAD:
                return self._read_head(letter)
            case _State.KEY:
                return self._read_key(letter)
            case _State.VALUE:
                return self._read_value(letter)
            case _ if letter in " \t\r\n":
                return Progress.READING
            case _State.KEY_OR_END | _State.AFTER_VALUE:
                return self._read_between(letter)
            case _State.COLON:
                self._state = _State.VALUE_START
                return Progress.READING if letter == ":" else Progress.BROKEN
            case _State.VALUE_START:
                return self._start_value(letter)
        raise AssertionError("every state is handled")

    def _read_head(self, letter: str) -> Progress:
        if letter != "{":
            self._head += letter
            return Progress.READING if len(self._head) <= _MAX_HEAD else Progress.BROKEN
        if not self._head:
            self._nesting = 1
            self._state = _State.KEY_OR_END
            return Progress.READING
        found = _BARE_NAME.fullmatch(self._head)
        if found is None or not self._take_name(found[1]):
            return Progress.BROKEN
        self._key = "arguments"
        return self._start_value(letter)

    def _read_between(self, letter: str) -> Progress:
        if letter == "}":
            self._nesting -= 1
            self._state = _State.AFTER_VALUE
            return Progress.READING if self._nesting else self._end()
        if self._state is _State.AFTER_VALUE:
            self._state = _State.KEY_OR_END
            return Progress.READING if letter == "," else Progress.BROKEN
        self._state = _State.KEY
        self._value = []
        return Progress.READING if letter == '"' else Progress.BROKEN

    def _read_key(self, letter: str) -> Progress:
        if letter == '"':
            self._key = "".join(self._value)
            self._state = _State.COLON
            return self._check_order()
        self._value.append(letter)
        return Progress.READING

    def _check_order(self) -> Progress:
        """JSON that only looks a little like a call is none where nothing marks calls."""
        if self._names is None or self._name is not None:
            return Progress.READING
        is_usual = self._keys in _KEYS_BEFORE_NAME
        if self._key != "name":
            self._keys = (*self._keys, self._key)
            is_usual = self._keys in _KEYS_BEFORE_NAME
        return Progress.READING if is_usual else Progress.BROKEN

    def _start_value(self, letter: str) -> Progress:
        if letter == "{" and self._key == "function":
            self._nesting += 1
            self._state = _State.KEY_OR_END
            return Progress.READING
        if self._names is not None and self._key == "function" and self._name is None:
            return Progress.BROKEN
        self._state = _State.VALUE
        self._value = []
        self._value_depth = 0
        self._is_quoted = self._is_escaped = False
        self._is_streamed = letter == "{" and self._key in _ARGUMENT_KEYS
        return self._read_value(letter)

    def _read_value(self, letter: str) -> Progress:
        if (
            self._value_depth == 0
            and not self._is_quoted
            and self._value
            and letter in ",}] \t\r\n"
        ):
            self._state = _State.AFTER_VALUE  # a number or a word ends before this letter
            return self._take_value() or self._read(letter)
        (self._new_arguments if self._is_streamed else self._value).append(letter)
        if self._is_quoted:
            self._is_quoted = self._is_escaped or letter != '"'
            self._is_escaped = letter == "\\" and not self._is_escaped
        else:
            self._is_quoted = letter == '"'
            self._value_depth += (letter in "{[") - (letter in "}]")
        if self._is_quoted or self._value_depth > 0 or letter not in '"}]':
            return Progress.READING
        self._state = _State.AFTER_VALUE
        return self._take_value() or Progress.READING

    def _take_value(self) -> Progress | None:
        """BROKEN where the value cannot be what its key says, DONE where nothing can follow."""
        if self._is_streamed:
            self._is_streamed, self._has_arguments = False, True
            return None if self._nesting else self._end()
        if self._names is not None and self._key == "type" and self._name is None:
            return None if self._value == list('"function"') else Progress.BROKEN
        if self._key not in _NAME_KEYS | _ARGUMENT_KEYS:
            return None
        try:
            value = json.loads("".join(self._value))
        except ValueError:
            return Progress.BROKEN
        if self._key in _NAME_KEYS:
            known = isinstance(value, str) and self._take_name(value)
            return None if known else Progress.BROKEN
        if isinstance(value, str):  # some models write the arguments as JSON within a text
            self._new_arguments.append(value)
            self._has_arguments = True
        return None

    def _take_name(self, name: str) -> bool:
        if (
            not name
            or self._name is not None
            or (self._names is not None and name not in self._names)
        ):
            return False
        self._name = name
        return True

    def _end(self) -> Progress:
        if self._name is None:
            return Progress.BROKEN
        if not self._has_arguments:
            self._new_arguments.append("{}")
        return Progress.DONE
