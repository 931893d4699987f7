"""`pipeserve bench grammars`: what holding answers to a form costs per token, on this CPU.

A model that knows nothing writes answers of several forms; timed is what a step waits for.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeserve.core.constraint import FreeRun, Grammar, TokenConstraint, WordArray
from pipeserve.gguf.reader import GGUFFile
from pipeserve.text.answer_grammar import CallableTool, begun_calls, forced_calls
from pipeserve.text.grammar import (
    GrammarCompiler,
    choice_grammar,
    json_grammar,
    regex_grammar,
    text_grammar,
)
from pipeserve.text.tokenizer import Tokenizer
from pipeserve.text.tool_calls import HERMES

MOST_TOKENS = 256
"""Of one answer."""

_RECORD: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
_ARITHMETIC = """\
root ::= sum
sum ::= product (("+" | "-") product)*
product ::= value (("*" | "/") value)*
value ::= [0-9]+ | "(" sum ")"
"""
_TOOLS = tuple(CallableTool(name=f"tool_{i}", parameters=dict(_RECORD)) for i in range(20))
FORMS: Mapping[str, Grammar] = {
    "json schema": json_grammar(dict(_RECORD)),
    "any json object": json_grammar({"type": "object"}),
    "regex": regex_grammar(r"([A-Z][a-z]{2,10} ){3,20}[0-9]{4}-[0-9]{2}-[0-9]{2}"),
    "choice": choice_grammar(["positive", "negative", "neutral"]),
    "gbnf": text_grammar(_ARITHMETIC),
    "calls of 20 tools": forced_calls(HERMES, _TOOLS, is_single=True, control={}),
    "text, 20 tools": begun_calls(HERMES, _TOOLS, control={}),
}


class CutTokenizer(Tokenizer):
    """The first tokens of a model's vocabulary, to see what its size costs."""

    def __init__(self, whole: Tokenizer, vocab_size: int) -> None:
        self._whole = whole
        self._size = min(vocab_size, whole.vocab_size)
        self.longest_token_bytes = whole.longest_token_bytes
        self.strips_leading_space = whole.strips_leading_space

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def bos_token_id(self) -> int | None:
        return self._whole.bos_token_id

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset(each for each in self._whole.eos_token_ids if each < self._size)

    def pieces(self, *, skip_special: bool) -> list[bytes]:
        return self._whole.pieces(skip_special=skip_special)[: self._size]

    def is_special(self, token_id: int) -> bool:
        return self._whole.is_special(token_id)

    def encode(
        self, text: str, *, add_special_tokens: bool, parse_special: bool = True
    ) -> list[int]:
        """None, so that whoever asks cuts the text at the longest tokens that there are."""
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class FormTimes:
    """Of one form: the time from a token to the mask of the next one."""

    form: str
    num_tokens: int
    compile_ms: float
    mean_us: float
    p50_us: float
    p99_us: float
    max_us: float


def run(model_path: Path, *, vocab_size: int | None, num_answers: int, wants_json: bool) -> int:
    """Measure and print."""
    with GGUFFile.open(model_path) as gguf_file:
        tokenizer = Tokenizer.from_gguf(gguf_file)
    if vocab_size is not None:
        tokenizer = CutTokenizer(tokenizer, vocab_size)
    compiler = GrammarCompiler(lambda: tokenizer, vocab_size=tokenizer.vocab_size)
    started_s = time.perf_counter()
    compiler.check(regex_grammar("a"))
    prepare_s = time.perf_counter() - started_s
    lines = [_measure(name, compiler, tokenizer, num_answers) for name in FORMS]
    head = {"vocab_size": tokenizer.vocab_size, "prepare_s": round(prepare_s, 3)}
    if wants_json:
        print(json.dumps({**head, "forms": [asdict(line) for line in lines]}))
        return 0
    print(f"{head['vocab_size']} tokens, prepared once in {prepare_s:.2f} s")
    print(
        f"{'form':18} {'tokens':>7} {'compile':>10} {'mean':>9} {'p50':>9} {'p99':>9} {'most':>9}"
    )
    for line in lines:
        times = "".join(
            f"{each:7.1f}us" for each in (line.mean_us, line.p50_us, line.p99_us, line.max_us)
        )
        print(f"{line.form:18} {line.num_tokens:7} {line.compile_ms:8.2f}ms {times}")
    return 0


def _measure(
    name: str, compiler: GrammarCompiler, tokenizer: Tokenizer, num_answers: int
) -> FormTimes:
    started_s = time.perf_counter()
    compiler.build(FORMS[name])
    compile_s = time.perf_counter() - started_s
    times_s: list[float] = []
    for seed in range(num_answers):
        times_s += _write(compiler, tokenizer, FORMS[name], random.Random(seed))
    times_us = 1e6 * np.array(times_s)
    return FormTimes(
        form=name,
        num_tokens=len(times_s),
        compile_ms=1e3 * compile_s,
        mean_us=float(times_us.mean()),
        p50_us=float(np.percentile(times_us, 50)),
        p99_us=float(np.percentile(times_us, 99)),
        max_us=float(times_us.max()),
    )


def _write(
    compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, chance: random.Random
) -> list[float]:
    """Seconds per token of one answer."""
    constraint, times_s = compiler.build(grammar), []
    untold: list[int] = []
    allowed = constraint.allowed()
    for _ in range(MOST_TOKENS):
        token_id = _any_token(allowed, tokenizer, chance)
        if token_id in tokenizer.eos_token_ids:
            break
        started_s = time.perf_counter()
        untold.append(token_id)
        allowed = _next(constraint, allowed, untold)
        times_s.append(time.perf_counter() - started_s)
    return times_s


def _any_token(allowed: WordArray | FreeRun, tokenizer: Tokenizer, chance: random.Random) -> int:
    if isinstance(allowed, FreeRun):
        return chance.randrange(tokenizer.vocab_size)
    ids = np.flatnonzero(np.unpackbits(allowed.view(np.uint8), bitorder="little"))
    return int(chance.choice(ids))


def _next(
    constraint: TokenConstraint, allowed: WordArray | FreeRun, untold: list[int]
) -> WordArray | FreeRun:
    """As the engine does: of a free run nothing is told before it ends."""
    if isinstance(allowed, FreeRun):
        is_over = untold[-1] in allowed.watched or len(untold) == allowed.max_tokens
        if not is_over:
            return allowed
    for token_id in untold:
        constraint.accept(token_id)
    untold.clear()
    return constraint.allowed()
