"""A server whose model knows nothing and writes anything that it may."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from pipeserve.core.sampling import SamplingParams
from pipeserve.text.chat_template import ChatTemplate
from pipeserve.text.grammar import GrammarCompiler
from tests.engine.running import running_engine
from tests.fakes import facts
from tests.server.conftest import Server, running_server
from tests.server.fakes import EOS, ByteTokenizer
from tests.server.test_tools import HERMES_TEMPLATE

VOCAB_SIZE = ByteTokenizer.vocab_size
CLOSING = frozenset({EOS, *b'"}]'})
WITHOUT_THOUGHTS = HERMES_TEMPLATE.replace("think>", "thought>")
"""A model that knows nothing would think for ever."""


def any_number(token_ids: Sequence[int], sampling: SamplingParams) -> int:
    """Of a row without a mask a letter; of one with a mask it is cut to what is allowed."""
    return zlib.crc32(bytes(str(token_ids), "ascii"), sampling.seed & 0xFFFFFFFF)


def eager(number: int, allowed: Sequence[int]) -> int:
    """Any allowed token, but often one that brings the answer nearer to its end."""
    closing = [each for each in allowed if each in CLOSING]
    chosen = closing if closing and number % 3 == 0 else allowed
    return chosen[number // 3 % len(chosen)]


@asynccontextmanager
async def writing_server() -> AsyncIterator[Server]:
    """HTTP, engine and grammars are real."""
    compiler = GrammarCompiler(ByteTokenizer, vocab_size=VOCAB_SIZE)  # type: ignore[arg-type]
    pipeline = facts(context_length=1024, num_blocks=4096, vocab_size=VOCAB_SIZE)
    async with (
        running_server() as server,
        running_engine(
            pipeline_facts=pipeline,
            constraints=compiler.build,
            next_token=any_number,
            pick=eager,
        ) as running,
    ):
        template = ChatTemplate(WITHOUT_THOUGHTS, bos_token="<|begin|>", eos_token="<|end|>")
        server.state.ready(replace(server.services, engine=running.client, chat_template=template))
        yield server
