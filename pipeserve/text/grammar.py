"""GrammarCompiler: what an answer must match, from what clients send to masks over the vocabulary.

May be used from any thread. Knows no HTTP. The work is done by llguidance, whose notation
definitions are in: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from pipeserve.core.constraint import Grammar, WordArray, num_words
from pipeserve.errors import GrammarError
from pipeserve.text.json_schema import compilable
from pipeserve.text.number_guard import NumberGuard, NumberTokens
from pipeserve.text.tokenizer import Tokenizer

MAX_DEFINITION_CHARACTERS = 1_000_000
MAX_LEXER_STATES = 50_000
"""Of one answer, 1 to 2 KB each; what else a grammar may take is as llguidance has it."""
MAX_WHITESPACE = 40
"""Characters between two tokens of JSON: models that are lost like to go on with these for ever."""

Part = dict[str, Any]
"""One grammar of a definition, of which the first is where an answer begins."""

_JSON = '"json_schema"'
"""A definition holds this where a part of it is a schema: in texts of others quotes are escaped."""

_JSON_OPTIONS: Mapping[str, Any] = {
    "whitespace_pattern": rf"[ \n\r\t]{{1,{MAX_WHITESPACE}}}",
    # What a schema says and the compiler does not know is an error.
    "lenient": False,
    "coerce_one_of": False,
}


def json_grammar(schema: object) -> Grammar:
    """Any JSON document that is valid by this schema.

    Raises:
        GrammarError: the schema is neither an object nor true or false, or a pattern in it is no
            regular expression.
    """
    return of_parts(json_part(schema))


def json_part(schema: object) -> Part:
    """As json_grammar, to be part of another."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise GrammarError("a JSON schema is an object, or true or false")
    # The schema's own options give way: they could make it lenient.
    return {"json_schema": {**compilable(schema), "x-guidance": _JSON_OPTIONS}}


def regex_grammar(pattern: str) -> Grammar:
    """Texts that match a regular expression from beginning to end."""
    return Grammar(definition=LLMatcher.grammar_from_regex(pattern))


def choice_grammar(choices: Sequence[str]) -> Grammar:
    """One of these texts."""
    alternatives = " | ".join(map(quoted, choices))
    return of_parts({"lark_grammar": f"start: {alternatives}"})


def text_grammar(text: str) -> Grammar:
    """A grammar in GBNF (llama.cpp's, from `root`) or in Lark's notation (from `start`).

    Raises:
        GrammarError: it is in neither.
    """
    try:
        return of_parts({"lark_grammar": grammar_from("grammar", text)})
    except ValueError as error:
        raise GrammarError(str(error)) from None


def of_parts(*parts: Part) -> Grammar:
    """The first is where an answer begins; others are found by their names."""
    return Grammar(definition=json.dumps({"grammars": parts}))


def quoted(text: str) -> str:
    """A literal in Lark's notation."""
    return json.dumps(text, ensure_ascii=False)


class GrammarCompiler:
    """Compiles for one tokenizer, which is read and prepared when the first grammar comes."""

    def __init__(self, read_tokenizer: Callable[[], Tokenizer], *, vocab_size: int) -> None:
        """vocab_size: of the model's logits."""
        self._read_tokenizer = read_tokenizer
        self._num_words = num_words(vocab_size)
        self._lock = threading.Lock()
        self._prepared: _Prepared | None = None
        self._limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)

    def check(self, grammar: Grammar) -> None:
        """Compile and forget.

        Raises:
            GrammarError: it does not compile, or no answer can match it.
        """
        self.build(grammar).allowed()

    def build(self, grammar: Grammar) -> GrammarConstraint:
        """A constraint at the beginning of an answer.

        Raises:
            GrammarError: it does not compile.
        """
        if len(grammar.definition) > MAX_DEFINITION_CHARACTERS:
            raise GrammarError(
                f"it has {len(grammar.definition)} characters; at most "
                f"{MAX_DEFINITION_CHARACTERS} are possible: shorten it"
            )
        prepared = self._vocabulary()
        matcher = LLMatcher(
            prepared.vocabulary, grammar.definition, log_level=0, limits=self._limits
        )
        if matcher.is_error():
            raise GrammarError(_first_lines(matcher.get_error()))
        guard = NumberGuard(prepared.numbers) if _JSON in grammar.definition else None
        return GrammarConstraint(matcher, prepared.ends, self._num_words, guard)

    def _vocabulary(self) -> _Prepared:
        with self._lock:
            if self._prepared is None:
                tokenizer = self._read_tokenizer()
                ends = tokenizer.eos_token_ids
                wrapped: Any = _Vocabulary(tokenizer)
                self._prepared = _Prepared(
                    vocabulary=LLTokenizer(wrapped, eos_token=sorted(ends)),
                    ends=ends,
                    numbers=NumberTokens(wrapped.tokens, self._num_words),
                )
            return self._prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A vocabulary as grammars are compiled for it."""

    vocabulary: LLTokenizer
    ends: frozenset[int]
    """The tokens that end an answer."""
    numbers: NumberTokens


class GrammarConstraint:
    """A TokenConstraint by llguidance."""

    def __init__(
        self, matcher: LLMatcher, ends: frozenset[int], num_words: int, guard: NumberGuard | None
    ) -> None:
        """ends: the tokens that end an answer, allowed where the grammar is satisfied."""
        self._matcher = matcher
        self._guard = guard
        self._ends = ends
        self._num_words = num_words

    def allowed(self) -> WordArray:
        mask = self._matcher.compute_bitmask()
        self._check()
        mask_W = np.zeros(self._num_words, np.int32)
        given_W = np.frombuffer(mask[: 4 * self._num_words], np.int32)
        mask_W[: len(given_W)] = given_W
        if not self._matcher.is_accepting():
            for token_id in self._ends:  # of a dead end nothing else is left
                mask_W.view(np.uint32)[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        if not mask_W.any():
            raise GrammarError(_DEAD_END)
        return mask_W if self._guard is None else self._guard.without_huge(mask_W)

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()
        if self._guard is not None:
            self._guard.accept(token_id)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(_first_lines(self._matcher.get_error()))


class _Vocabulary:
    """A tokenizer as llguidance looks at it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        ends = tokenizer.eos_token_ids
        self.tokens = tokenizer.pieces(skip_special=False)
        self.eos_token_id = min(ends)
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = [
            token_id
            for token_id in range(len(self.tokens))
            if tokenizer.is_special(token_id) or token_id in ends
        ]
        self._tokenizer = tokenizer
        special = frozenset(self.special_token_ids)
        self._ids = {
            piece: token_id for token_id, piece in enumerate(self.tokens) if token_id not in special
        }

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text that stands within another, with its bytes and no others."""
        ids = self._tokenizer.encode(
            _BEFORE + text if self._tokenizer.strips_leading_space else text,
            add_special_tokens=False,
            parse_special=False,
        )
        raw = text.encode()
        joined, first = b"", len(ids)
        while first > 0 and len(joined) < len(raw):
            first -= 1
            joined = self.tokens[ids[first]] + joined
        return ids[first:] if joined == raw else self._longest_pieces(raw)

    def _longest_pieces(self, raw: bytes) -> list[int]:
        ids: list[int] = []
        most = self._tokenizer.longest_token_bytes
        while raw:
            ends = range(min(most, len(raw)), 0, -1)
            end = next((end for end in ends if raw[:end] in self._ids), None)
            if end is None:
                return ids  # the vocabulary lacks this byte
            ids.append(self._ids[raw[:end]])
            raw = raw[end:]
        return ids


_BEFORE = "\x01"
"""What a tokenizer that puts a space before every text puts it before: a byte that no token but its
own holds."""


_DEAD_END = "no token of this model can go on with an answer that matches it"
_OVERLAPPING = "the branches of a oneOf may overlap; send anyOf, or a const that tells them apart"


def _first_lines(problem: str) -> str:
    """What concerns the author of the grammar, without a trace of the compiler's own."""
    # It has no other way to say that the vocabulary lacks a byte that must come.
    if problem.startswith("NoExtension") or "forced bytes" in problem:
        return _DEAD_END
    if "coerce_one_of" in problem:  # an option of the compiler's, of which no client knows
        return _OVERLAPPING
    return problem.split("<backtrace>")[0].strip()[:500]
