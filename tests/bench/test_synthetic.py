"""Synthetic files: the types of each recipe, sane values, a file that the whole house accepts."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gguf.quants
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from pipeserve.bench.random_blocks import WEIGHT_STD, random_blocks
from pipeserve.bench.recipes import PURE_TYPES, tensor_types, use_more_bits
from pipeserve.bench.shapes import SHAPES, find_shape
from pipeserve.bench.synthetic import provide_model, weight_bytes
from pipeserve.errors import ConfigError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.kernels.quant_layout import LAYOUTS
from pipeserve.models.registry import check_model
from pipeserve.text.chat_template import ChatTemplate
from pipeserve.text.tokenizer import Tokenizer

TINY = SHAPES["tiny"]


def test_the_layers_with_more_bits() -> None:
    in_32 = {layer for layer in range(32) if use_more_bits(layer, 32)}
    assert in_32 == {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}


@pytest.mark.parametrize(
    ("name", "counts", "num_bytes"),
    [
        ("llama-8b", {Kind.Q4_K: 193, Kind.Q6_K: 33, Kind.F32: 65}, 4.91e9),
        ("llama-70b", {Kind.Q4_K: 441, Kind.Q5_K: 40, Kind.Q6_K: 81, Kind.F32: 161}, 42.5e9),
    ],
)
def test_q4_k_m_has_the_types_and_size_of_the_published_files(
    name: str, counts: dict[Kind, int], num_bytes: float
) -> None:
    """The counts that llama.cpp prints on loading them, less Llama 3's frequency divisors."""
    shape = SHAPES[name]
    types = tensor_types("q4_k_m", shape)
    assert Counter(types.values()) == counts
    assert types["output.weight"] == Kind.Q6_K
    assert types["token_embd.weight"] == Kind.Q4_K
    assert weight_bytes(shape, "q4_k_m") == pytest.approx(num_bytes, rel=0.002)


def test_rows_that_fit_no_block_of_256_fall_back() -> None:
    types = tensor_types("q4_k_m", SHAPES["smollm-135m"])
    assert types["token_embd.weight"] == Kind.Q8_0, "a tied head counts as the output"
    assert types["blk.0.attn_q.weight"] == Kind.Q5_0
    assert types["blk.0.ffn_down.weight"] == Kind.Q6_K, "its rows have 1536 weights"
    assert tensor_types("mxfp4", SHAPES["smollm-135m"])["blk.0.attn_q.weight"] == Kind.MXFP4


def test_unknown_names_say_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"recipe q4_k_x is not built in.*q4_k_m, q4_0"):
        tensor_types("q4_k_x", TINY)
    with pytest.raises(ConfigError, match=r"shape llama-9b is not built in.*llama-8b"):
        find_shape("llama-9b")
    odd = dataclasses.replace(TINY, ffn_size=500)
    with pytest.raises(ConfigError, match=r"ffn_down.weight has rows of 500 weights.*Q8_0"):
        tensor_types("q4_k_m", odd)


def test_every_layout_on_the_gpu_has_a_recipe() -> None:
    assert {name.lower() for name in LAYOUTS} < set(PURE_TYPES)


@pytest.mark.parametrize("kind", PURE_TYPES.values(), ids=lambda kind: kind.name)
def test_random_values_have_a_mean_near_zero_and_a_small_spread(kind: Kind) -> None:
    blocks = random_blocks(kind, np.random.default_rng(1))
    assert len(blocks) % 2 == 1
    values = gguf.quants.dequantize(blocks[-2000:], kind)
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(WEIGHT_STD, rel=0.2)
    assert abs(values.mean()) < WEIGHT_STD / 5, "codes of 4 bits go from -8 to 7"


def test_the_file_is_a_model_of_that_shape(tmp_path: Path) -> None:
    path = provide_model("tiny", TINY, "q4_k_m", folder=tmp_path)
    with GGUFFile.open(path) as gguf_file:
        model = check_model(gguf_file)
        assert model == dataclasses.replace(TINY, rms_eps=float(np.float32(TINY.rms_eps)))
        types = tensor_types("q4_k_m", TINY)
        assert {name: info.type for name, info in gguf_file.tensors.items()} == types
        assert sum(info.num_bytes for info in gguf_file.tensors.values()) == weight_bytes(
            TINY, "q4_k_m"
        )
        rows = [row.tobytes() for row in gguf_file.raw("blk.1.ffn_up.weight")]
        assert len(set(rows)) == len(rows), "no two rows are alike"


def test_the_text_side_accepts_the_vocabulary(tmp_path: Path) -> None:
    path = provide_model("tiny", TINY, "q8_0", folder=tmp_path)
    with GGUFFile.open(path) as gguf_file:
        tokenizer = Tokenizer.from_gguf(gguf_file)
        template = ChatTemplate.from_gguf(gguf_file, tokenizer)
    assert tokenizer.vocab_size == TINY.vocab_size
    assert tokenizer.eos_token_ids == {TINY.vocab_size - 1}
    text = template.render([{"role": "user", "content": "Grüße!!"}])
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(range(TINY.vocab_size - 2)), "every made-up token has a text"


def test_a_vocabulary_of_real_size_has_no_token_twice(tmp_path: Path) -> None:
    shape = dataclasses.replace(TINY, vocab_size=128256, num_layers=1)
    path = provide_model("wide", shape, "q4_0", folder=tmp_path)
    with GGUFFile.open(path) as gguf_file:
        assert Tokenizer.from_gguf(gguf_file).vocab_size == 128256


def test_the_file_is_used_again_only_for_the_same_shape_and_recipe(tmp_path: Path) -> None:
    path = provide_model("tiny", TINY, "q4_0", folder=tmp_path)
    first = path.stat().st_ino
    assert provide_model("tiny", TINY, "q4_0", folder=tmp_path).stat().st_ino == first
    other = dataclasses.replace(TINY, num_layers=3)
    assert provide_model("tiny", other, "q4_0", folder=tmp_path) == path
    with GGUFFile.open(path) as gguf_file:
        assert check_model(gguf_file).num_layers == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny-q4_0.gguf"]


def test_a_truncated_file_is_written_again_with_the_same_bytes(tmp_path: Path) -> None:
    path = provide_model("tiny", TINY, "q4_0", folder=tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100_000])
    assert provide_model("tiny", TINY, "q4_0", folder=tmp_path).read_bytes() == whole


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(ConfigError, match=r"would take 49128\d+ bytes and .* has 1000000000 free"):
        provide_model("llama-8b", SHAPES["llama-8b"], "q4_k_m", folder=tmp_path)
    assert not list(tmp_path.iterdir())
