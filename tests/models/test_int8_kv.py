"""KV cache in int8: chunking changes nothing, and the demo model stays close to float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeserve.core.sampling import SamplingParams
from pipeserve.gguf.reader import GGUFFile
from pipeserve.kernels.backend import backend_for
from pipeserve.models.layers import (
    AttentionMetadata,
    DecodeMetadata,
    Decoder,
    PrefillMetadata,
)
from pipeserve.runtime import kv_cache
from pipeserve.text.tokenizer import Tokenizer
from tests.models import tiny
from tests.models.agreement import LOGIT_TOLERANCE, assert_same_output
from tests.models.test_quantised import load, mean_kl
from tests.runtime.driver import Prompt, Schedule, running_driver

CPU = torch.device("cpu")
PAGE = 16
ALLOWED_KL = 5e-3
TEXT = """The river rises in the hills above the town, where three small streams meet below an old
stone bridge. In spring it carries so much water that the lower fields stand flooded for weeks, and
the farmers move their cattle to the slopes. By August one can walk across it without wetting one's
knees. An engineer who came here in 1874 wrote that no map of the valley was true for longer than
ten years, because the river made itself a new bed whenever it liked."""


def chunk_metadata(first: int, num_tokens: int, num_blocks: int) -> AttentionMetadata:
    """A chunk of one sequence whose blocks lie in order; a single token is a decode row."""
    positions_T = torch.arange(first, first + num_tokens)
    table_SB = torch.arange(num_blocks).unsqueeze(0)
    first_S, num_tokens_S = torch.tensor([first]), torch.tensor([num_tokens])
    is_decode = num_tokens == 1
    decode = DecodeMetadata(block_table_SB=table_SB, lengths_S=first_S + 1)
    prefill = PrefillMetadata(
        block_table_SB=table_SB,
        starts_S=torch.zeros_like(first_S),
        first_positions_S=first_S,
        num_tokens_S=num_tokens_S,
    )
    return AttentionMetadata(
        positions_T=positions_T,
        slots_T=positions_T,
        decode=decode if is_decode else None,
        prefill=None if is_decode else prefill,
    )


def logits(
    decoder: Decoder, token_ids: Sequence[int], *, kv: torch.dtype, chunks: Sequence[int]
) -> torch.Tensor:
    """[T, V], computed in chunks that together are the whole sequence."""
    assert sum(chunks) == len(token_ids)
    num_blocks = -(-len(token_ids) // PAGE)
    caches = kv_cache.allocate(
        decoder.config,
        num_layers=len(decoder.layers),
        num_blocks=num_blocks,
        block_size=PAGE,
        dtype=kv,
        device=CPU,
    )
    first, parts = 0, []
    with torch.inference_mode():
        for num_tokens in chunks:
            x_TD = decoder.embed(torch.tensor(token_ids[first : first + num_tokens]))
            metadata = chunk_metadata(first, num_tokens, num_blocks)
            parts.append(decoder.logits(decoder.forward(x_TD, caches, metadata)))
            first += num_tokens
    return torch.cat(parts)


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8_kv") / "tiny.gguf"
    return tiny.write_gguf(path, tiny.random_llama(tiny.llama_config()))


@pytest.mark.parametrize("chunks", [(1,) * 50, (7, 1, 16, 26), (49, 1)], ids=str)
def test_chunks_see_what_the_whole_prompt_sees(chunks: tuple[int, ...], tiny_path: Path) -> None:
    decoder = load(tiny_path, CPU, backend_for(CPU), keeps_quantised=False)
    token_ids = np.random.default_rng(2).integers(0, 300, 50).tolist()
    plain = logits(decoder, token_ids, kv=torch.float32, chunks=(50,))
    whole = logits(decoder, token_ids, kv=torch.int8, chunks=(50,))
    chunked = logits(decoder, token_ids, kv=torch.int8, chunks=chunks)
    # Matrix products of other shapes round differently, and a code may fall to the other side.
    # Attention to unquantised keys of the own chunk would differ as much as float32 does.
    change = (chunked - whole).abs().max()
    quantisation = (whole - plain).abs().max()
    assert change < quantisation / 10


def test_the_pipeline_gives_the_same_however_it_is_cut(tiny_path: Path) -> None:
    rng = np.random.default_rng(4)
    sampling = SamplingParams(max_tokens=12, seed=0, temperature=0.0, num_logprobs=2)
    prompts = [
        Prompt(token_ids=rng.integers(0, 300, length).tolist(), sampling=sampling)
        for length in (5, 33, 60)
    ]
    whole, cut = Schedule(chunk_size=128, num_cohorts=1), Schedule(chunk_size=9, seed=5)
    options = {"kv_cache_dtype": "int8", "block_size": 4}
    with running_driver(tiny_path, ("cpu",), **options) as driver:
        alone = [driver.generate([prompt], whole)[0] for prompt in prompts]
    with running_driver(tiny_path, ("cpu", "cpu"), **options) as driver:
        together = driver.generate(prompts, cut)
    with running_driver(tiny_path, ("cpu",), block_size=4) as driver:
        unquantised = driver.generate(prompts, whole)
    for result, baseline in zip(together, alone, strict=True):
        assert_same_output(result, baseline)
    first = [[result.logprobs[0] for result in results] for results in (alone, unquantised)]
    assert np.abs(np.subtract(*first)).max() > 10 * LOGIT_TOLERANCE, "the option takes effect"


def test_demo_model_stays_close_to_float32(demo_model_path: Path) -> None:
    decoder = load(demo_model_path, CPU, backend_for(CPU), keeps_quantised=False)
    with GGUFFile.open(demo_model_path) as file:
        token_ids = Tokenizer.from_gguf(file).encode(TEXT, add_special_tokens=False)
    num_tokens = len(token_ids)
    chunks = (num_tokens - 30, 24, *(1,) * 6)
    plain = logits(decoder, token_ids, kv=torch.float32, chunks=chunks)
    int8 = logits(decoder, token_ids, kv=torch.int8, chunks=chunks)
    assert 0 < mean_kl(int8, plain) < ALLOWED_KL
