"""A client's JSON schema as the grammar compiler takes it: patterns in its notation, and formats
that it writes too freely held to what validators accept.

Pure. Drafts: https://json-schema.org/specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeserve.text.ecma_regex import rust_regex

_MAPS = frozenset(
    ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
)
"""Keywords whose values have names of the client's own as keys."""
_VALUES = frozenset(("const", "enum", "default", "examples", "example"))
"""Keywords whose values are documents and no schemas."""

# https://www.rfc-editor.org/rfc/rfc3339#section-5.6, without the year 0 and leap seconds: neither
# Python's nor JavaScript's dates have them.
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_TENS_OF_4 = "(?:0[48]|[2468][048]|[13579][26])"
_LEAP_YEAR = f"(?:[0-9]{{2}}{_TENS_OF_4}|{_TENS_OF_4}00)"
_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_HOUR, _MINUTE = "(?:[01][0-9]|2[0-3])", "[0-5][0-9]"
_TIME = rf"{_HOUR}:{_MINUTE}:{_MINUTE}(?:\.[0-9]{{1,9}})?(?:Z|[+-]{_HOUR}:{_MINUTE})"
_FORMATS: Mapping[str, str] = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    # https://www.rfc-editor.org/rfc/rfc5321#section-4.5.3.1
    "email": "^[^@]{1,64}@[^@]{1,253}$",
    "hostname": r"^[\x21-\x7e]{1,253}$",
}


def compilable(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy that says the same, but for formats, of which it may say more.

    Raises:
        GrammarError: a pattern is no regular expression of ECMA-262.
    """
    written: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _VALUES:
            written[key] = value
        elif key == "pattern" and isinstance(value, str):
            written[key] = rust_regex(value)
        elif key in _MAPS and isinstance(value, dict):
            named = {name: _any(each) for name, each in value.items()}
            written[key] = _by_pattern(named) if key == "patternProperties" else named
        else:
            written[key] = _any(value)
    return _with_format(written)


def _by_pattern(schemas: Mapping[str, Any]) -> dict[str, Any]:
    """Two patterns may become the same."""
    written: dict[str, Any] = {}
    for pattern, schema in schemas.items():
        name = rust_regex(pattern)
        written[name] = {"allOf": [written[name], schema]} if name in written else schema
    return written


def _any(value: object) -> Any:
    if isinstance(value, dict):
        return compilable(value)
    return [_any(each) for each in value] if isinstance(value, list) else value


def _with_format(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("format")
    pattern = _FORMATS.get(name) if isinstance(name, str) else None
    if pattern is None:
        return schema
    if "pattern" not in schema:
        return {**schema, "pattern": pattern}
    others = schema.get("allOf")
    if "allOf" in schema and not isinstance(others, list):
        return schema  # wrong, as the compiler says
    return {**schema, "allOf": [*(others or ()), {"pattern": pattern}]}
