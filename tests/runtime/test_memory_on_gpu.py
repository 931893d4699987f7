"""A card's memory: a storm of the dearest requests reaches the computed peak and stays below it.

Takes the whole card: not to be run beside other tests that use one.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeserve.bench.shapes import find_shape
from pipeserve.bench.synthetic import provide_model
from pipeserve.core.sampler_chain import WHOLE_SEQUENCE, Dry, SamplerChain
from pipeserve.core.sampling import SamplingParams
from pipeserve.errors import ConfigError
from tests.runtime.driver import Prompt, Schedule, running_driver

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

logger = logging.getLogger(__name__)

CARD = "cuda:0"


@pytest.fixture(scope="module", params=["demo", "llama-8b"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "demo":
        found = request.getfixturevalue("demo_model_path")
        assert isinstance(found, Path)
        return found
    folder = tmp_path_factory.mktemp("synthetic")
    return provide_model(request.param, find_shape(request.param), "q4_k_m", folder=folder)


CHAIN = SamplerChain(dry=Dry(multiplier=1.0), typical_p=0.9, penalty_window=WHOLE_SEQUENCE)


def storm(num_rows: int, vocab_size: int) -> list[Prompt]:
    """Long prompts that fill every row, sampled with all that costs memory."""
    rng = np.random.default_rng(5)
    return [
        Prompt(
            token_ids=rng.integers(0, vocab_size, 100 + 13 * (row % 40)).tolist(),
            sampling=SamplingParams(
                max_tokens=4,
                seed=row,
                top_p=0.95,
                top_k=1000,
                presence_penalty=0.1,
                logit_bias=((5, 1.0),),
                num_logprobs=20,
                chain=CHAIN if row % 2 else None,
            ),
        )
        for row in range(num_rows)
    ]


@pytest.mark.parametrize("devices", [(CARD,), (CARD, CARD)], ids="+".join)
def test_a_storm_reaches_the_computed_peak(path: Path, devices: tuple[str, ...]) -> None:
    options = {"kv_cache_bytes": None, "max_num_seqs": None, "context_length": 4096}
    torch.cuda.empty_cache()
    with running_driver(path, devices, **options) as driver:
        facts = driver.pipeline.facts
        (card,) = driver.pipeline.cards
        schedule = Schedule(chunk_size=facts.max_batch_tokens, num_cohorts=len(devices))
        for _ in range(2):
            driver.generate(storm(facts.num_rows, facts.vocab_size), schedule)
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info(CARD)
        logger.info("%s; in use after the storm: %.2f GiB", card, (total - free) / 2**30)
        assert total - free <= card.expected_peak_bytes + card.memory.margin_bytes
        assert total - free >= 0.95 * card.expected_peak_bytes
    torch.cuda.empty_cache()


def test_a_kv_cache_that_does_not_fit_is_refused(demo_model_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_bytes asks for") as caught:
        with running_driver(demo_model_path, (CARD,), kv_cache_bytes=10**13):
            pass
    assert "left for the KV cache" in str(caught.value)
