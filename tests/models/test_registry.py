"""What is wrong with a model file is said before any weight is read, naming file and fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeserve.errors import (
    GGUFFormatError,
    MissingTensorError,
    ModelError,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.registry import check_model
from tests.models import tiny

WRONG = {
    "unknown architecture": (
        {"architecture": "mamba7"},
        UnsupportedModelError,
        ["mamba7", "known: llama"],
    ),
    "missing layer tensor": (
        {"without": ("blk.1.ffn_up.weight",)},
        MissingTensorError,
        ["blk.1.ffn_up.weight"],
    ),
    "missing embedding": (
        {"without": ("token_embd.weight",)},
        MissingTensorError,
        ["token_embd.weight"],
    ),
    "vocabulary too large": (
        {"tokens": 301},
        VocabularyMismatchError,
        ["301 tokens", "300 rows"],
    ),
    "vocabulary too small": ({"tokens": 299}, VocabularyMismatchError, ["299 tokens"]),
    "wrong shape": (
        {"replaced": {"blk.0.attn_k.weight": np.zeros((8, 48), np.float32)}},
        GGUFFormatError,
        ["blk.0.attn_k.weight", "[8, 48]", "[16, 48]"],
    ),
    "wrong shape of an optional tensor": (
        {"replaced": {"rope_freqs.weight": np.zeros(3, np.float32)}},
        GGUFFormatError,
        ["rope_freqs.weight", "[3]", "[4]"],
    ),
    "integer weights": (
        {"replaced": {"blk.2.ffn_down.weight": np.zeros((48, 80), np.int32)}},
        UnsupportedModelError,
        ["blk.2.ffn_down.weight", "I32"],
    ),
    "missing metadata": (
        {"metadata": {"llama.block_count": None}},
        GGUFFormatError,
        ["llama.block_count"],
    ),
    "no layers": (
        {"metadata": {"llama.block_count": 0}},
        GGUFFormatError,
        ["llama.block_count is 0"],
    ),
    "heads that cannot be grouped": (
        {"metadata": {"llama.attention.head_count_kv": 4}},
        GGUFFormatError,
        ["llama.attention.head_count is 6"],
    ),
    "odd rotated part": (
        {"metadata": {"llama.rope.dimension_count": 7}},
        GGUFFormatError,
        ["llama.rope.dimension_count is 7"],
    ),
    "values of another size than keys": (
        {"metadata": {"llama.attention.value_length": 4}},
        UnsupportedModelError,
        ["value_length is 4"],
    ),
    "heads that differ between layers": (
        {"metadata": {"llama.attention.head_count_kv": [2, 6, 2]}},
        UnsupportedModelError,
        ["head_count_kv", "[2, 6]"],
    ),
    "experts": (
        {"metadata": {"llama.expert_count": 8}},
        UnsupportedModelError,
        ["llama.expert_count is 8"],
    ),
    "unknown rope scaling": (
        {
            "metadata": {
                "llama.rope.scaling.type": "longrope",
                "llama.rope.scaling.factor": 4.0,
            }
        },
        UnsupportedModelError,
        ["longrope", "yarn"],
    ),
    "rope scaling by nothing": (
        {"metadata": {"llama.rope.scaling.factor": 0.0}},
        GGUFFormatError,
        ["llama.rope.scaling.factor is 0"],
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_fault_is_named(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, kind, words = WRONG[fault]
    path = tiny.write_gguf(
        tmp_path / "wrong.gguf", tiny.random_llama(tiny.llama_config()), **changes
    )

    def read_a_weight(self: GGUFFile, name: str) -> None:
        pytest.fail(f"{name} was read")

    with GGUFFile.open(path) as file:
        monkeypatch.setattr(GGUFFile, "raw", read_a_weight)
        with pytest.raises(ModelError) as caught:
            check_model(file)
    assert type(caught.value) is kind
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_counts_per_layer_may_be_equal(tmp_path: Path) -> None:
    model = tiny.random_llama(tiny.llama_config())
    path = tiny.write_gguf(
        tmp_path / "array.gguf", model, metadata={"llama.attention.head_count_kv": [2, 2, 2]}
    )
    with GGUFFile.open(path) as file:
        config = check_model(file)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (6, 2, 8)
    assert not config.has_tied_head
