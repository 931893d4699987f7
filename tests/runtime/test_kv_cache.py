"""KV cache: what a block takes is what is allocated, and int8 holds about twice the tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pipeserve.config import Config
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.config import ModelConfig
from pipeserve.models.registry import check_model
from pipeserve.runtime import kv_cache
from pipeserve.runtime.plan import plan_pipeline
from tests.models import tiny

NUM_BLOCKS = 5
BLOCK_SIZE = 8


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kv_cache") / "tiny.gguf"
    return tiny.write_gguf(path, tiny.random_llama(tiny.llama_config()))


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> ModelConfig:
    with GGUFFile.open(tiny_path) as file:
        return check_model(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_a_block_takes_what_is_allocated(dtype: torch.dtype, model: ModelConfig) -> None:
    caches = kv_cache.allocate(
        model,
        num_layers=2,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    assert len(caches) == 2
    for cache in caches:
        stored = [cache.k_BPKH, cache.v_BPKH, cache.k_scale_BKP, cache.v_scale_BKP]
        tensors = [tensor for tensor in stored if tensor is not None]
        assert len(tensors) == (4 if dtype == torch.int8 else 2)
        assert not any(bool(tensor.any()) for tensor in tensors)
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        assert num_bytes == NUM_BLOCKS * kv_cache.block_bytes(model, BLOCK_SIZE, dtype)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_int8_takes_about_half_of_float16(head_dim: int, model: ModelConfig) -> None:
    model = dataclasses.replace(model, head_dim=head_dim)
    half, int8 = (kv_cache.block_bytes(model, 16, dtype) for dtype in (torch.float16, torch.int8))
    assert half / int8 == pytest.approx(2, rel=0.04)


def test_int8_holds_more_blocks_in_the_same_bytes(tiny_path: Path, model: ModelConfig) -> None:
    def num_blocks(**options: object) -> int:
        config = Config(kv_cache_bytes=100_000, max_num_seqs=64, **options)  # type: ignore[arg-type]
        return plan_pipeline(model, config, (torch.device("cpu"),), (3,)).facts.num_blocks

    # Heads of 8 in float32 are 32 bytes, in int8 8 and a scale of 2.
    assert num_blocks() == 100_000 // (3 * 2 * 16 * 2 * 32)
    assert num_blocks(kv_cache_dtype="int8") == 100_000 // (3 * 2 * 16 * 2 * 10)
