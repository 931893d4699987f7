"""Layer times and memory limits on a card: what is measured is there, and is given back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeserve.config import Config
from pipeserve.core.sampling import SamplingParams
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.registry import check_model
from pipeserve.runtime.layer_times import measure_device
from pipeserve.runtime.loading import plan_shares
from pipeserve.runtime.placement import place
from pipeserve.runtime.plan import first_facts, layer_ranges
from tests.runtime.driver import Prompt, running_driver, timings_folder

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

CARD = torch.device("cuda:0")


@pytest.mark.parametrize("weights", ["quantised", "bf16"])
def test_layers_and_head_are_measured(weights: str, demo_model_path: Path) -> None:
    config = Config(weights=weights, max_num_seqs=32, max_num_batched_tokens=512)  # type: ignore[arg-type]
    torch.zeros(1, device=CARD)
    before = torch.cuda.memory_allocated(CARD)
    with GGUFFile.open(demo_model_path) as file:
        model = check_model(file)
        facts = first_facts(model, config, (CARD,))
        times = measure_device(file, model, CARD, config=config, facts=facts)
    curves = [times.head, *(own.decode for own in times.layers.values())]
    for curve in curves:
        assert curve.sizes == (1, 8, 32)
        assert min(curve.seconds) > 0
    assert all(own.prefill.sizes == (512,) for own in times.layers.values())
    assert times.step_s >= 0
    assert torch.cuda.memory_allocated(CARD) - before < 64 * 2**20, "libraries keep some workspace"


def test_a_limit_reaches_the_card(demo_model_path: Path) -> None:
    """Two stages of one card, each with a limit, and the layers placed by measured times."""
    limit = 2**31
    prompt = Prompt(
        token_ids=np.arange(40).tolist(),
        sampling=SamplingParams(max_tokens=8, seed=0, temperature=0.0),
    )
    with running_driver(
        demo_model_path, ("cuda:0", "cuda:0"), memory_limit_bytes=(limit,)
    ) as driver:
        assert len(driver.generate([prompt])[0].token_ids) == 8
        (card,) = driver.pipeline.cards
    config = Config(memory_limit_bytes=(limit,), max_num_seqs=16, cache_dir=timings_folder().name)  # type: ignore[arg-type]
    with GGUFFile.open(demo_model_path) as file:
        model = check_model(file)
        split = place(file, model, config, ("cuda:0", "cuda:0")).split
        shares = plan_shares(file, model, layer_ranges(split), devices=(CARD,) * 2, config=config)
    weights = sum(share.device_bytes for share in shares)
    assert card.memory.limit_bytes == 2 * limit - weights
    assert card.memory.room_bytes <= 2 * limit - weights - card.memory.kept_bytes


def test_a_card_gets_more_layers_than_a_cpu(demo_model_path: Path) -> None:
    config = Config(cache_dir=timings_folder().name)  # type: ignore[arg-type]
    with GGUFFile.open(demo_model_path) as file:
        placement = place(file, check_model(file), config, ("cpu", "cuda:0"))
    layers = dict(zip(placement.devices, placement.split, strict=True))
    assert layers[CARD] > layers[torch.device("cpu")]
