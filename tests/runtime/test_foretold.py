"""Cuts are as fast as the cost model foretells. Measured, and so not among the ordinary tests."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeserve.config import Config
from pipeserve.core.sampling import SamplingParams
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.registry import check_model
from pipeserve.runtime import partition
from pipeserve.runtime.survey import survey_devices
from tests.runtime.driver import Prompt, Schedule, running_driver, timings_folder

SPLITS = ((22, 8), (15, 15), (8, 22))
SLOWDOWNS = (1.0, 3.0)
NUM_ROWS, NUM_OUTPUT = 8, 8


def foretold_s(path: Path) -> list[float]:
    """Per output token, of the slowest stage of each split."""
    config = Config(max_num_seqs=NUM_ROWS, cache_dir=Path(timings_folder().name))
    with GGUFFile.open(path) as file:
        devices = (torch.device("cpu"),) * 2
        survey = survey_devices(file, check_model(file), config, devices, slowdowns=SLOWDOWNS)
    costs = survey.costs(NUM_ROWS)
    return [partition.price(costs, split).slowest_s for split in SPLITS]


def measured_s(path: Path, split: tuple[int, ...]) -> float:
    """Per output token, of prompts with four times as many tokens as their output."""
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(
            token_ids=rng.integers(0, 49152, 4 * NUM_OUTPUT).tolist(),
            sampling=SamplingParams(max_tokens=NUM_OUTPUT, seed=row, temperature=0.0),
        )
        for row in range(NUM_ROWS)
    ]
    with running_driver(
        path, slowdowns=SLOWDOWNS, layer_split=split, max_num_seqs=NUM_ROWS
    ) as driver:
        driver.generate(prompts[:2])
        started_s = time.perf_counter()
        driver.generate(prompts, Schedule(chunk_size=256))
        return (time.perf_counter() - started_s) / (NUM_ROWS * NUM_OUTPUT)


@pytest.mark.wide
@pytest.mark.timeout(300)
def test_cuts_are_as_fast_in_the_order_that_was_foretold(demo_model_path: Path) -> None:
    foretold = foretold_s(demo_model_path)
    measured = [measured_s(demo_model_path, split) for split in SPLITS]
    assert np.argsort(foretold).tolist() == np.argsort(measured).tolist(), (foretold, measured)
