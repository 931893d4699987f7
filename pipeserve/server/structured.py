"""What requests say about the form of an answer: JSON, a regular expression, a choice, a grammar.

Runs in the text executor. The fields are OpenAI's, vLLM's (of today and before) and llama-server's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import from_json

from pipeserve.core.constraint import Grammar
from pipeserve.errors import GrammarError, InvalidParameterError
from pipeserve.server.body import Body, Refused, kind_of_text
from pipeserve.text.grammar import choice_grammar, json_grammar, regex_grammar, text_grammar

MAX_ALTERNATIVES = 10_000

Alternatives = Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_ALTERNATIVES)]
Pattern = Annotated[str, Field(min_length=1)]
Schema = dict[str, Any]
SchemaOrText = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Schema, Tag("<list>")], Discriminator(kind_of_text)
]


class NamedSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None
    """Taken without effect: a schema is always kept to."""


class ResponseFormat(Body):
    """OpenAI's, and llama-server's with the schema beside the type."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None

    @model_validator(mode="after")
    def _json_schema_needs_a_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.schema_ is None and self.json_schema is None:
            raise InvalidParameterError(
                'response_format.json_schema is missing; type "json_schema" needs it',
                param="response_format.json_schema",
            )
        return self

    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        named = None if self.json_schema is None else self.json_schema.schema_
        schema = named if self.schema_ is None else self.schema_
        return json_grammar({"type": "object"} if schema is None else schema)


class StructuredOutputs(Body):
    """vLLM's: one of these."""

    json_: Annotated[SchemaOrText | None, Field(alias="json")] = None
    """A schema, or its text."""
    regex: Pattern | None = None
    choice: Alternatives | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None
    structural_tag: Annotated[Any, Refused("send json, regex, choice or grammar")] = None

    @model_validator(mode="after")
    def _one_of_them(self) -> StructuredOutputs:
        num_given = len(self._given)
        if num_given != 1:
            raise InvalidParameterError(
                f"structured_outputs has {num_given} of json, regex, choice, grammar and "
                "json_object; send one of them",
                param="structured_outputs",
            )
        return self

    @property
    def _given(self) -> list[object]:
        every = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None)
        return [each for each in every if each is not None]

    def to_grammar(self) -> Grammar:
        if self.json_ is not None:
            return json_grammar(_schema(self.json_))
        if self.regex is not None:
            return regex_grammar(self.regex)
        if self.choice is not None:
            return choice_grammar(self.choice)
        if self.grammar is not None:
            return text_grammar(self.grammar)
        return json_grammar({"type": "object"})


class FormRequest(Body):
    """The fields of a request that say what its answers must match; at most one of them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: Schema | None = None
    """llama-server's."""
    grammar: str | None = None
    """GBNF, or Lark's notation."""
    guided_json: SchemaOrText | None = None
    guided_regex: Pattern | None = None
    guided_choice: Alternatives | None = None
    guided_grammar: Pattern | None = None

    @model_validator(mode="after")
    def _at_most_one(self) -> FormRequest:
        given = [name for name in _FIELDS if self._is_given(name)]
        if len(given) > 1:
            raise InvalidParameterError(
                f"{given[1]} is given and so is {given[0]}; leave one of them out", param=given[1]
            )
        return self

    def _is_given(self, name: str) -> bool:
        value = getattr(self, name)
        if isinstance(value, ResponseFormat):
            return value.type != "text"
        return value is not None and value != ""

    @property
    def form_field(self) -> str | None:
        """The field that says what answers must match; None where none does."""
        return next((name for name in _FIELDS if self._is_given(name)), None)

    def grammar_of_field(self) -> Grammar | None:
        """What answers must match; None: anything.

        Raises:
            GrammarError: it is not understood.
        """
        if self.response_format is not None and self.response_format.type != "text":
            return self.response_format.grammar()
        structured = self.structured_outputs
        if structured is None and self.form_field is not None:
            structured = StructuredOutputs.model_construct(
                json_=self.json_schema if self.guided_json is None else self.guided_json,
                regex=self.guided_regex,
                choice=self.guided_choice,
                grammar=self.guided_grammar or self.grammar or None,
            )
        return None if structured is None else structured.to_grammar()


_FIELDS = tuple(FormRequest.model_fields)


def _schema(given: Schema | str) -> object:
    if not isinstance(given, str):
        return given
    try:
        return from_json(given)  # which bounds the depth, as that of bodies is
    except ValueError as error:
        raise GrammarError(f"the schema is not JSON: {error}") from None
