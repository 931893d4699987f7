"""JSON Schema's regular expressions (ECMA-262's) in the notation of llguidance (Rust's `regex`).

Pure. Where both write the same thing with another meaning, ECMA-262's holds; what only it has
(look-around, back-references) is left for the compiler to refuse.
"""

from __future__ import annotations

import re

from pipeserve.errors import GrammarError

_SPACE = r"\t\n\x0b\x0c\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_CLASSES = {"d": "0-9", "s": _SPACE, "w": "A-Za-z0-9_"}
_ANY = r"[^\n\r\u2028\u2029]"
_CONTROLS = {"t": "\t", "n": "\n", "v": "\x0b", "f": "\x0c", "r": "\r"}
_SPECIAL = frozenset("\\.+*?()|[]{}^$#&-~")

_COUNT = re.compile(r"\{\d+(,\d*)?\}")
_GROUP = re.compile(r"\((\?(:|i\)|i:|P?<[A-Za-z_]\w*>|<?[=!]))?")
_CODE = re.compile(
    r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}|c([A-Za-z])|0(?!\d)"
)
_PROPERTY = re.compile(r"[pP]\{[\w=]+\}")


def rust_regex(pattern: str) -> str:
    """The same expression in Rust's notation.

    Raises:
        GrammarError: it has an escape or a group that ECMA-262 lacks.
    """
    return _Translation(pattern).whole()


def _literal(character: str) -> str:
    if character == "\\":
        return r"\x5c"  # so that no letter after it can be read as the name of a class
    return f"\\{character}" if character in _SPECIAL else character


class _Translation:
    """One pass from left to right."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def whole(self) -> str:
        parts = []
        while self._at < len(self._pattern):
            parts.append(self._item())
        return "".join(parts)

    def _take(self, notation: re.Pattern[str]) -> re.Match[str] | None:
        found = notation.match(self._pattern, self._at)
        if found is not None:
            self._at = found.end()
        return found

    def _next(self) -> str:
        self._at += 1
        return self._pattern[self._at - 1]

    def _peek(self, ahead: int = 0) -> str:
        return self._pattern[self._at + ahead : self._at + ahead + 1]

    def _item(self) -> str:
        if self._peek() == "(":
            return self._group()
        if (count := self._take(_COUNT)) is not None:
            return count[0]
        character = self._next()
        if character == "\\":
            escaped = self._escape()
            return _literal(escaped) if len(escaped) == 1 else escaped
        if character == "[":
            return self._class()
        if character == ".":
            return _ANY
        # A brace that counts nothing and a bracket that closes nothing stand for themselves.
        return _literal(character) if character not in "^$*+?|)" else character

    def _group(self) -> str:
        found = self._take(_GROUP)
        assert found is not None
        if found[0] == "(" and self._peek() == "?":
            raise GrammarError(f"the pattern {self._pattern!r} has a group that ECMA-262 lacks")
        return found[0]

    def _class(self) -> str:
        parts = ["[^" if self._peek() == "^" else "["]
        self._at += self._peek() == "^"
        if self._peek() == "]":
            raise GrammarError(f"the pattern {self._pattern!r} has an empty class")
        while self._peek() not in ("", "]"):
            low = self._class_atom()
            is_range = self._peek() == "-" and self._peek(1) not in ("", "]")
            if not is_range:
                parts.append(_literal(low) if len(low) == 1 else low)
                continue
            self._at += 1
            high = self._class_atom()
            if len(low) == len(high) == 1:
                parts.append(f"{_literal(low)}-{_literal(high)}")
            else:  # beside a class of its own a hyphen is one
                parts += [_literal(each) if len(each) == 1 else each for each in (low, "-", high)]
        parts.append(self._next() if self._peek() else "")
        return "".join(parts)

    def _class_atom(self) -> str:
        """One character, or a class of more."""
        character = self._next()
        if character != "\\":
            return character
        if self._peek() == "b":
            self._at += 1
            return "\x08"
        return self._escape()

    def _escape(self) -> str:
        """What stands behind a backslash: the character that it means, or Rust's notation."""
        if (code := self._take(_CODE)) is not None:
            digits = code[1] or code[2] or code[3]
            if digits is not None:
                return self._character(int(digits, 16))
            return chr(ord(code[4]) % 32) if code[4] else "\0"
        if (named := self._take(_PROPERTY)) is not None:
            return f"\\{named[0]}"
        name = self._next() if self._peek() else ""
        if name.lower() in _CLASSES:
            return f"[{'^' if name.isupper() else ''}{_CLASSES[name.lower()]}]"
        if name in ("b", "B", "k") or name.isdigit():
            return f"\\{name}"  # the compiler says why it cannot
        if name in _CONTROLS:
            return _CONTROLS[name]
        if not name or (name.isascii() and name.isalpha()):
            raise GrammarError(
                f"the pattern {self._pattern!r} has the escape \\{name}, which ECMA-262 lacks"
            )
        return name

    def _character(self, code: int) -> str:
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise GrammarError(f"the pattern {self._pattern!r} names no character by {code:#x}")
        return chr(code)
