"""A model that knows nothing, held to a grammar: what it may write."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from pipeserve.core.constraint import Grammar
from pipeserve.text.grammar import GrammarCompiler, json_grammar
from pipeserve.text.tokenizer import Tokenizer

MOST_TOKENS = 3000
CLOSING = frozenset(b'"}]')


def allowed_ids(words_W: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little")).tolist()


class Writer:
    """Any allowed token, but for a liking to come to an end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.compiler = GrammarCompiler(lambda: tokenizer, vocab_size=tokenizer.vocab_size + 70)

    def write(self, grammar: Grammar, seed: int, *, most: int = MOST_TOKENS) -> bytes | None:
        """An answer, or None where it was cut off."""
        chance, pieces = random.Random(seed), self.tokenizer.pieces(skip_special=False)
        constraint, answer = self.compiler.build(grammar), b""
        for _ in range(most):
            ids = allowed_ids(constraint.allowed())
            assert ids[-1] < self.tokenizer.vocab_size
            ends = self.tokenizer.eos_token_ids.intersection(ids)
            if ends and (len(ids) == len(ends) or chance.random() < 0.3):
                return answer
            going_on = [each for each in ids if each not in ends]
            closing = [each for each in going_on if set(pieces[each]) <= CLOSING]
            token_id = chance.choice(closing if closing and chance.random() < 0.3 else going_on)
            constraint.accept(token_id)
            answer += pieces[token_id]
        return None

    def can_write(self, schema: Any, text: str) -> bool:
        """Whether this may be a whole answer; of a vocabulary of bytes."""
        constraint = self.compiler.build(json_grammar(schema))
        for byte in text.encode():
            if byte not in allowed_ids(constraint.allowed()):
                return False
            constraint.accept(byte)
        return not self.tokenizer.eos_token_ids.isdisjoint(allowed_ids(constraint.allowed()))
