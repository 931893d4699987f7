"""Runs that end with a step too many in flight: the tokens are those of a sequence left alone."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipeserve.config import Config
from pipeserve.core.constraint import FreeRun, Grammar, WordArray
from pipeserve.core.sampling import SamplingParams
from pipeserve.engine.engine import Engine, Inbox
from pipeserve.engine.messages import EngineMessage, Shutdown, Submit, TokenEvents
from pipeserve.gguf.reader import GGUFFile
from pipeserve.runtime.pipeline import Pipeline
from tests.fakes import mask_of
from tests.models import tiny

PATIENCE_S = 60.0
VOCAB_SIZE = 300
WATCHED = frozenset(range(0, VOCAB_SIZE, 3))


class Restless:
    """Forbids nothing, but wants to be asked after every third kind of token."""

    def __init__(self) -> None:
        self._is_masked = False

    def allowed(self) -> WordArray | FreeRun:
        if self._is_masked:
            return mask_of(range(VOCAB_SIZE), VOCAB_SIZE)
        return FreeRun(watched=WATCHED, max_tokens=7)

    def accept(self, token_id: int) -> None:
        self._is_masked = token_id in WATCHED and not self._is_masked


@contextmanager
def running(
    path: Path, devices: Sequence[str]
) -> Iterator[tuple[Inbox, queue.SimpleQueue[EngineMessage]]]:
    config = Config(block_size=4, num_look_ahead=1)
    inbox: Inbox = queue.SimpleQueue()
    messages: queue.SimpleQueue[EngineMessage] = queue.SimpleQueue()
    with GGUFFile.open(path) as gguf_file:
        pipeline = Pipeline.start(
            gguf_file, config, devices, post=inbox.put, on_progress=lambda event: None
        )
    engine = Engine(
        pipeline=pipeline,
        inbox=inbox,
        post=messages.put,
        stage_timeout_s=PATIENCE_S,
        constraints=lambda grammar: Restless(),
    )
    engine.start()
    try:
        yield inbox, messages
    finally:
        inbox.put(Shutdown())
        assert engine.join(PATIENCE_S)
        assert pipeline.close(PATIENCE_S)


def generate(
    inbox: Inbox,
    messages: queue.SimpleQueue[EngineMessage],
    samplings: Sequence[SamplingParams],
    first_id: int,
    grammar: Grammar | None,
) -> list[list[int]]:
    """All together."""
    tokens: dict[int, list[int]] = {}
    for index, sampling in enumerate(samplings):
        rng = np.random.default_rng(index)
        prompt = tuple(rng.integers(0, VOCAB_SIZE, 3 + 4 * index).tolist())
        tokens[first_id + index] = []
        inbox.put(
            Submit(
                seq_id=first_id + index, prompt_token_ids=prompt, sampling=sampling, grammar=grammar
            )
        )
    while any(len(tokens[first_id + i]) < s.max_tokens for i, s in enumerate(samplings)):
        events = messages.get(timeout=PATIENCE_S)
        assert isinstance(events, TokenEvents)
        for seq_id, token_id in zip(events.seq_ids, events.token_ids, strict=True):
            tokens[seq_id].append(token_id)
    return list(tokens.values())


@pytest.mark.parametrize("num_stages", [1, 2])
def test_what_is_dropped_leaves_no_trace(num_stages: int, tmp_path: Path) -> None:
    """Neither in the KV cache nor in the counts that penalties go by."""
    path = tiny.write_gguf(tmp_path / "tiny.gguf", tiny.random_llama(tiny.llama_config()))
    samplings = [
        SamplingParams(max_tokens=40, seed=1, temperature=0.0, repetition_penalty=1.2),
        SamplingParams(max_tokens=40, seed=2, presence_penalty=1.0, frequency_penalty=0.5),
        SamplingParams(max_tokens=40, seed=3, top_k=20, repetition_penalty=1.3),
        SamplingParams(max_tokens=40, seed=4, temperature=1.3, logit_bias=((6, 3.0),)),
        SamplingParams(max_tokens=40, seed=5, top_p=0.8, min_tokens=20),
    ]
    with running(path, ("cpu",) * num_stages) as (inbox, messages):
        expected = generate(inbox, messages, samplings, 0, None)
        found = generate(inbox, messages, samplings, 10, Grammar(definition="any"))
    assert found == expected
    assert sum(token_id in WATCHED for row in found for token_id in row) > 20
