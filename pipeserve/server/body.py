"""Body: what every JSON request has in common, and how a wrong one is explained.

Runs in the text executor. Knows no endpoint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, ErrorDetails, core_schema

from pipeserve.errors import InvalidParameterError


class Body(BaseModel):
    """Strict types, no NaN; null is the same as absent. What becomes of unknown fields is said
    where a body is parsed."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="ignore",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


Ignored = Annotated[Any, WithJsonSchema({"description": "Taken, and without effect."})]
"""The type of a field whose absence no client can notice."""


class Refused:
    """Marks a field that is understood but not supported, unless it holds a value that asks for
    nothing."""

    def __init__(self, mend: str, *harmless: object) -> None:
        """mend: what the client can do instead. harmless: values besides null that are taken."""
        self._mend = mend
        self._harmless = harmless

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [None, *self._harmless], "description": f"Not supported: {self._mend}."}

    def _check(self, value: object) -> object:
        if value is None or value in self._harmless:
            return value
        raise ValueError(f"this is not supported: {self._mend}")


def kind_of_text(value: object) -> str:
    """Which branch of `string or list` a value belongs to; tags in <> stay out of messages."""
    return "<text>" if isinstance(value, str) else "<list>"


BodyT = TypeVar("BodyT", bound=Body)


def parse(body: bytes, kind: type[BodyT], *, strict_fields: bool = False) -> BodyT:
    """Reads a request body.

    strict_fields: refuse fields that no one knows, which are ignored otherwise.

    Raises:
        InvalidParameterError: not JSON, or a field is missing, malformed or not supported.
    """
    try:
        return kind.model_validate_json(body, extra="forbid" if strict_fields else "ignore")
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    param = _field_name(problem["loc"]) or None
    raise InvalidParameterError(_explain(problem, param), param=param)


def check_token_ids(ids: Sequence[int], *, vocab_size: int, param: str) -> None:
    """Raises InvalidParameterError where an id is not in the vocabulary."""
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
    raise InvalidParameterError(
        f"{param} names token {wrong}; ids of this model run from 0 to {vocab_size - 1}",
        param=param,
    )


_ENCODER = json.JSONEncoder(ensure_ascii=False)


def shown(value: object) -> str:
    """A value as JSON, cut short: enough to recognise it, not enough to leak a prompt."""
    text = ""
    for part in _ENCODER.iterencode(value):  # not all of what may be megabytes
        text += part
        if len(text) > 60:
            return f"{text[:57]}..."
    return text


_MUST_BE = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "string_too_long": "a string of at most {max_length} characters",
    "string_too_short": "a string of at least {min_length} character",
}
"""What to write instead, by pydantic's name of the mistake."""


def _explain(problem: ErrorDetails, field: str | None) -> str:
    details = problem.get("ctx", {})
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {details['error']}"
    if field is None:
        return "the body is not a JSON object; send one with the field model and the others"
    if problem["type"] == "missing":
        return f"{field} is missing; the request needs it"
    if problem["type"] == "extra_forbidden":
        return f"{field} is not known here; leave it out (strict_fields refuses unknown fields)"
    if problem["type"] == "value_error":
        return f"{field} is {shown(problem['input'])}; {details['error']}"
    must_be = _MUST_BE.get(problem["type"])
    if problem["type"] == "tuple_type" and str(problem["loc"][-1]).startswith("<"):
        must_be = "a string or a list"  # neither branch of a union fits
    mend = f"it must be {must_be.format(**details)}" if must_be else problem["msg"]
    return f"{field} is {shown(problem['input'])}; {mend}"


def _field_name(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "content", "<list>", 1) -> "messages[0].content[1]"."""
    name = ""
    for step in location:
        if isinstance(step, int):
            name += f"[{step}]"
        elif not step.startswith("<"):
            name += f".{step}" if name else step
    return name
