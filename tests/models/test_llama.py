"""Tiny random Llama models and the demo model, through the real pipeline, against transformers."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pipeserve.core.sampling import SamplingParams
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.config import ModelConfig, YarnScaling
from pipeserve.models.llama import halves_from_pairs
from pipeserve.models.registry import check_model
from pipeserve.models.rotary import rotary_frequencies, rotary_scale
from tests.models import tiny
from tests.models.agreement import assert_agrees, recorded_logits, reference_logits
from tests.runtime.driver import Prompt, Schedule, running_driver

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "grouped queries, untied head": {},
    "one kv head per query head": {"num_key_value_heads": 6},
    "a single kv head, tied head": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "tied head": {"tie_word_embeddings": True},
    "heads wider than the model": {"head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear rope scaling": {"rope_parameters": LINEAR_ROPE},
    "llama 3 rope scaling": {"rope_parameters": LLAMA3_ROPE, "head_dim": 16},
    "yarn rope scaling": {"rope_parameters": YARN_ROPE, "head_dim": 16},
}
TYPES = [
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    *(kind for kind in GGMLQuantizationType if kind in gguf.quants._type_traits),
]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, seed=0, temperature=0.0)


def check_against(
    path: Path,
    reference: LlamaForCausalLM,
    prompts: list[list[int]],
    *,
    num_tokens: int,
    **options: object,
) -> None:
    """All prompts together through two stages, every logit of every step compared."""
    with recorded_logits() as record, running_driver(path, **options) as driver:
        results = driver.generate(
            [Prompt(token_ids=ids, sampling=greedy(num_tokens)) for ids in prompts],
            Schedule(chunk_size=24),
        )
    last_row = driver.pipeline.facts.num_rows - 1
    for index, (ids, result) in enumerate(zip(prompts, results, strict=True)):
        ours = record.of_row(last_row - index, len(ids), num_tokens)
        theirs = reference_logits(reference, ids, result.token_ids)
        assert_agrees(result.token_ids, ours, theirs, least_decided=num_tokens // 2)


def random_prompts(vocab_size: int, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers(variant: str, tmp_path: Path) -> None:
    model = tiny.random_llama(tiny.llama_config(**VARIANTS[variant]))
    path = tiny.write_gguf(tmp_path / "tiny.gguf", model)
    prompts = random_prompts(model.config.vocab_size, [1, 7, 40, 130])
    check_against(path, model, prompts, num_tokens=40, block_size=4)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_that_the_gguf_package_can_dequantise(
    kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    config = tiny.llama_config(
        num_hidden_layers=1,
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=4,
        head_dim=64,
    )
    model = tiny.random_llama(config)
    rng = np.random.default_rng(1)
    writer = GGUFWriter(tmp_path / "quantised.gguf", "llama")
    tiny.write_metadata(writer, config)
    dequantised = {}
    for name, values in tiny.gguf_tensors(model).items():
        if values.ndim == 1 or name == "token_embd.weight":
            writer.add_tensor(name, values)
            dequantised[name] = values
        else:
            raw = tiny.random_blocks(values.shape, kind, rng)
            writer.add_tensor(name, raw, raw_dtype=kind)
            dequantised[name] = gguf.quants.dequantize(raw, kind)
    path = tiny.finish(writer, tmp_path / "quantised.gguf")
    load_reference(model, dequantised)
    prompts = random_prompts(config.vocab_size, [5])
    check_against(path, model, prompts, num_tokens=8, devices=("cpu",))


def load_reference(model: LlamaForCausalLM, tensors: dict[str, np.ndarray]) -> None:
    """Put tensors under GGUF names and in GGUF order into a transformers model."""
    num_heads = {
        "attn_q": model.config.num_attention_heads,
        "attn_k": model.config.num_key_value_heads,
    }
    state = {}
    for name, array in tensors.items():
        values = torch.from_numpy(np.array(array))
        if name in tiny.GLOBAL_NAMES:
            state[tiny.GLOBAL_NAMES[name]] = values
            continue
        _, layer, part, kind = name.split(".")
        if part in num_heads:
            values = halves_from_pairs(values, num_heads[part], model.config.head_dim)
        state[f"model.layers.{layer}.{tiny.LAYER_NAMES[part]}.{kind}"] = values
    model.load_state_dict(state)


def test_rows_of_queries_come_back_from_the_converters_order() -> None:
    rows = torch.arange(24.0).view(24, 1)
    stored = torch.from_numpy(tiny.pairs_from_halves(rows.numpy(), 2))
    assert not torch.equal(stored, rows)
    assert torch.equal(halves_from_pairs(stored, 2, 12), rows)


def test_rows_outside_the_rotated_part_stay() -> None:
    rows = torch.arange(16.0).view(16, 1)
    moved = halves_from_pairs(rows, 2, 4).view(2, 8)
    assert moved[0].tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert moved[1].tolist() == [8, 10, 9, 11, 12, 13, 14, 15]


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones(tmp_path: Path) -> None:
    model = tiny.random_llama(tiny.llama_config(rope_parameters=YARN_ROPE, head_dim=64))
    with GGUFFile.open(tiny.write_gguf(tmp_path / "yarn.gguf", model)) as file:
        config: ModelConfig = check_model(file)
    assert isinstance(config.rope_scaling, YarnScaling)
    plain = 1.0 / 10000.0 ** (torch.arange(0, 64, 2) / 64)
    scaled = rotary_frequencies(config, None)
    assert scaled[0] == plain[0]
    torch.testing.assert_close(scaled[-1], plain[-1] / 4)
    assert rotary_scale(config.rope_scaling) == pytest.approx(1 + 0.1 * np.log(4))


CHATS = [
    "What is the capital of France?",
    "Write a Python function that reverses a list.",
    "Tell me a short story about a fox.",
]


@pytest.fixture(scope="module")
def demo_reference(demo_model_path: Path) -> LlamaForCausalLM:
    """transformers' own reading of the demo model's file, dequantised to float32."""
    return AutoModelForCausalLM.from_pretrained(
        demo_model_path.parent, gguf_file=demo_model_path.name, dtype=torch.float32
    ).eval()


def chat_ids(path: Path, text: str) -> list[int]:
    """ChatML by hand, tokenised by transformers: this test does not depend on our text layer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(chat)["input_ids"]


def test_demo_model_equals_transformers(
    demo_model_path: Path, demo_reference: LlamaForCausalLM
) -> None:
    prompts = [chat_ids(demo_model_path, text) for text in CHATS]
    check_against(demo_model_path, demo_reference, prompts, num_tokens=48)
