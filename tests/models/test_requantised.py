"""The re-written demo models and their reference are what they claim to be."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.registry import check_model
from tests.models.block_quantisers import SUPER_BLOCK, quantise
from tests.models.requantised import (
    ALL_TYPES,
    FloatModel,
    read_model,
    reference_model,
    transformers_state,
    widen,
    write_in_type,
)

CPU = torch.device("cpu")

LARGEST_ERROR = {
    **{"Q8_0": 0.006, "F32": 0.0, "F16": 3e-4, "BF16": 2e-3, "Q6_K": 0.02, "Q3_K": 0.17},
    **dict.fromkeys(("Q5_0", "Q5_1", "Q5_K"), 0.05),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS"), 0.09),
    **{"MXFP4": 0.13, "Q2_K": 0.35},
}
"""Relative, of normally distributed weights: about a third of a step."""


@pytest.fixture(scope="module")
def demo(demo_model_path: Path) -> FloatModel:
    return read_model(demo_model_path)


@pytest.mark.parametrize("type_name", ALL_TYPES)
def test_quantised_values_come_back(type_name: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.0, 0.05, (64, 3 * SUPER_BLOCK)).astype(np.float32)
    values[:, 2 * SUPER_BLOCK + 64 :] = 0.0
    values[5] = 0.0
    kind = Kind[type_name]
    back = gguf.quants.dequantize(quantise(values, kind), kind)
    error = np.linalg.norm(back - values) / np.linalg.norm(values)
    assert error <= LARGEST_ERROR[type_name]
    np.testing.assert_array_equal(back[values == 0.0], 0.0)


def test_reference_holds_what_transformers_reads_from_the_file(
    demo: FloatModel, demo_model_path: Path
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        demo_model_path.parent, gguf_file=demo_model_path.name, dtype=torch.float32
    )
    config = theirs.config
    for field in ("rms_norm_eps", "rope_parameters", "head_dim", "tie_word_embeddings"):
        assert getattr(demo.config, field) == pytest.approx(getattr(config, field)), field
    ours, expected = transformers_state(demo), theirs.state_dict()
    assert set(expected) - set(ours) == {"lm_head.weight"}
    for name, values in ours.items():
        torch.testing.assert_close(values, expected[name], atol=0.0, rtol=0.0)


def test_the_widened_model_computes_the_same(demo: FloatModel) -> None:
    wide = widen(demo)
    assert wide.tensors["token_embd.weight"].shape == (49152, 768)
    assert wide.tensors["blk.0.attn_k.weight"].shape == (256, 768)
    ids = torch.tensor([np.random.default_rng(0).integers(0, 49152, 24).tolist()])
    with torch.inference_mode():
        narrow_logits, wide_logits = (
            reference_model(model, CPU)(ids).logits for model in (demo, wide)
        )
    torch.testing.assert_close(wide_logits, narrow_logits, atol=1e-4, rtol=0.0)


def test_a_file_holds_the_widened_model_in_its_type(demo: FloatModel, tmp_path: Path) -> None:
    layer = {name: values for name, values in demo.tensors.items() if ".blk" in f".{name}"}
    kept = {name: values for name, values in layer.items() if name.startswith("blk.0.")}
    ends = {name: values for name, values in demo.tensors.items() if name not in layer}
    config = type(demo.config)(**{**demo.config.to_dict(), "num_hidden_layers": 1})
    small = FloatModel(config=config, tensors={**kept, **ends})
    path = write_in_type(tmp_path / "m.gguf", small, Kind.Q6_K)
    with GGUFFile.open(path) as file:
        assert check_model(file).hidden_size == 768
        assert file.tensors["blk.0.ffn_down.weight"].type is Kind.Q6_K
        assert file.tensors["output_norm.weight"].type is Kind.F32
    back = read_model(path)
    wide = widen(small)
    assert back.config.rms_norm_eps == pytest.approx(wide.config.rms_norm_eps, rel=1e-6)
    for name, values in wide.tensors.items():
        np.testing.assert_allclose(back.tensors[name], values, atol=0.03 * np.abs(values).max())
