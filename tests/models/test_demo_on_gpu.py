"""The demo model on GPU stages: quantised weights, Triton kernels, CUDA graphs, against float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeserve.core.sampling import SamplingParams
from tests.models.agreement import recorded_logits, reference_logits
from tests.models.test_quantised import mean_kl
from tests.runtime.driver import Prompt, Schedule, running_driver

pytestmark = pytest.mark.gpu

NUM_TOKENS = 64
ALLOWED_KL = 5e-3
"""Mean per token where activations are int8 for few rows, and keys and values may be int8."""
DECIDED_MARGIN = 0.5
"""Twice the logit error that int8 activations may make at the likeliest tokens."""


LAST_CARD = f"cuda:{max(0, torch.cuda.device_count() - 1)}"
"""With one card, the second stage is on it as well."""
STAGES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "one": (("cuda:0",), {}),
    "one, int8 KV": (("cuda:0",), {"kv_cache_dtype": "int8"}),
    "two of a card": (("cuda:0", "cuda:0"), {}),
    "two of a card, int8 KV": (("cuda:0", "cuda:0"), {"kv_cache_dtype": "int8"}),
    "card and CPU": (("cuda:0", "cpu"), {}),
    "card and CPU, int8 KV": (("cuda:0", "cpu"), {"kv_cache_dtype": "int8"}),
    "two cards, peer copies": (("cuda:0", LAST_CARD), {"hand_off": "peer"}),
    "two cards, staged": (("cuda:0", LAST_CARD), {"hand_off": "staged"}),
}


@pytest.mark.parametrize(("devices", "options"), STAGES.values(), ids=STAGES)
def test_demo_model_stays_close_to_float32(
    devices: tuple[str, ...], options: dict[str, Any], demo_model_path: Path
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        demo_model_path.parent, gguf_file=demo_model_path.name, dtype=torch.float32
    ).eval()
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 49152, length).tolist() for length in (3, 17, 40, 90, 200)]
    sampling = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0)
    with (
        recorded_logits() as record,
        running_driver(demo_model_path, devices, **options) as driver,
    ):
        results = driver.generate(
            [Prompt(token_ids=ids, sampling=sampling) for ids in prompts],
            Schedule(chunk_size=64, num_cohorts=len(devices)),
        )
    last_row = driver.pipeline.facts.num_rows - 1
    for index, (ids, result) in enumerate(zip(prompts, results, strict=True)):
        ours = record.of_row(last_row - index, len(ids), NUM_TOKENS)
        theirs = reference_logits(reference, ids, result.token_ids)
        assert mean_kl(torch.from_numpy(ours), torch.from_numpy(theirs)) < ALLOWED_KL
        second, first = np.sort(theirs, axis=1)[:, -2:].T
        decided = first - second > DECIDED_MARGIN
        assert decided.any()
        np.testing.assert_array_equal(
            np.array(result.token_ids)[decided], theirs.argmax(axis=1)[decided]
        )
