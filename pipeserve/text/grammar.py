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

from pipeserve.core.constraint import Grammar, TokenConstraint, WordArray, num_words
from pipeserve.errors import GrammarError
from pipeserve.text.begun_calls import CallsAnywhere, CallsAtStart
from pipeserve.text.json_schema import compilable
from pipeserve.text.number_guard import NumberGuard, NumberTokens
from pipeserve.text.thoughts_first import Anything, ThoughtsFirst
from pipeserve.text.tokenizer import Tokenizer
from pipeserve.text.word_tokens import WordTokens

MAX_DEFINITION_CHARACTERS = 1_000_000
MAX_LEXER_STATES = 50_000
"""Of one answer, 1 to 2 KB each; what else a grammar may take is as llguidance has it."""
MAX_WHITESPACE = 40

Part = dict[str, Any]
"""One grammar of a definition, of which the first is where an answer begins."""

_JSON = '"json_schema"'
"""A definition holds this where a part of it is a schema: in texts of others quotes are escaped."""

_JSON_OPTIONS: Mapping[str, Any] = {
    "whitespace_pattern": rf"[ \n\r\t]{{1,{MAX_WHITESPACE}}}",
    "coerce_one_of": False,
}


def json_grammar(schema: object) -> Grammar:
    """Any JSON document that is valid by this schema.

    Raises:
        GrammarError: the schema is neither an object nor true or false, or a pattern in it is no
            regular expression.
    """
    return of_parts(json_part(schema))


def json_part(schema: object, *, is_strict: bool = True) -> Part:
    """As json_grammar, to be part of another.

    is_strict: keywords that cannot be kept to are an error; else they are ignored.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise GrammarError("a JSON schema is an object, or true or false")
    # The schema's own options give way: they could make it lenient.
    options = {**_JSON_OPTIONS, "lenient": not is_strict}
    return {"json_schema": {**compilable(schema), "x-guidance": options}}


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
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._prepared: _Prepared | None = None
        self._limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)

    def check(self, grammar: Grammar) -> None:
        """Compile and forget.

        Raises:
            GrammarError: it does not compile, or no answer can match it.
        """
        if grammar.definition:
            self._masked(grammar.definition).allowed()

    def build(self, grammar: Grammar) -> TokenConstraint:
        """A constraint at the beginning of an answer.

        Raises:
            GrammarError: it does not compile.
        """
        if grammar.thoughts is None:
            return self._answer(grammar)
        words = self._vocabulary().words
        return ThoughtsFirst(grammar.thoughts, lambda: self._answer(grammar), words)

    def _answer(self, grammar: Grammar) -> TokenConstraint:
        definition, calls = grammar.definition, grammar.calls
        if not definition:
            return Anything()
        first = self._masked(definition)
        if calls is None:
            return first
        words = self._vocabulary().words
        if calls.is_anywhere:
            return CallsAnywhere(
                lambda: self._masked(definition),
                calls.beginnings[0],
                words,
                text_follows=calls.text_follows,
            )
        return CallsAtStart(first, calls.beginnings, words)

    def _masked(self, definition: str) -> GrammarConstraint:
        vocabulary = self._vocabulary()
        # Anew for each answer: copies share the lexer's states, of which there may be so many.
        matcher = self._compile(definition, vocabulary)
        guard = NumberGuard(vocabulary.numbers) if _JSON in definition else None
        words = num_words(self._vocab_size)
        return GrammarConstraint(matcher, vocabulary.ends, words, guard)

    def _compile(self, definition: str, vocabulary: _Prepared) -> LLMatcher:
        if len(definition) > MAX_DEFINITION_CHARACTERS:
            raise GrammarError(
                f"it has {len(definition)} characters; at most "
                f"{MAX_DEFINITION_CHARACTERS} are possible: shorten it"
            )
        matcher = LLMatcher(vocabulary.tokens, definition, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GrammarError(_first_lines(matcher.get_error()))
        return matcher

    def _vocabulary(self) -> _Prepared:
        with self._lock:
            if self._prepared is None:
                tokenizer = self._read_tokenizer()
                ends = tokenizer.eos_token_ids
                seen = _Vocabulary(tokenizer)
                wrapped: Any = seen
                self._prepared = _Prepared(
                    tokens=LLTokenizer(wrapped, eos_token=sorted(ends)),
                    ends=ends,
                    words=WordTokens(seen.tokens, seen, vocab_size=self._vocab_size),
                    numbers=NumberTokens(seen.tokens, num_words(self._vocab_size)),
                )
            return self._prepared


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prepared:
    """What is made of a tokenizer once."""

    tokens: LLTokenizer
    ends: frozenset[int]
    """The tokens that end an answer."""
    words: WordTokens
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

    def is_end(self, token_id: int) -> bool:
        """Whether the token ends answers."""
        return token_id in self._ends

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

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
