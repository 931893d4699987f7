"""The demo model on a GPU with its matrices in each type, against float32 of the same values.

Under CUDA graphs, in every regime of the matrix products.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedModel

from pipeserve.core.sampling import SamplingParams
from pipeserve.gguf.reader import GGUFFile
from pipeserve.text.tokenizer import Tokenizer
from tests.models.agreement import recorded_logits, reference_logits
from tests.models.decided import INT8, decided_tokens
from tests.models.requantised import (
    ALL_TYPES,
    FloatModel,
    read_model,
    reference_model,
    write_in_type,
)
from tests.models.test_quantised import mean_kl
from tests.runtime.driver import Driver, Prompt, Schedule, running_driver

logger = logging.getLogger(__name__)

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
FEW_ROWS = tuple(zip((340, 9, 33, 64), (130, 110, 90, 70), strict=True))
"""Lengths of prompt and output: a prompt that is computed in one chunk, where matrices are
dequantised first, then steps of 4, 3, 2 and 1 rows, which are integer products."""
A_BATCH = tuple((20 + 5 * index, 40) for index in range(12))
"""Steps of 12 rows, and prompts in small chunks beside them."""


@pytest.fixture(scope="module")
def demo(demo_model_path: Path) -> FloatModel:
    return read_model(demo_model_path)


@pytest.fixture(scope="module")
def text_ids(demo_model_path: Path) -> list[int]:
    """Of English prose. On tokens at random a model of few bits, which its rounding has already
    led astray, makes more of every further error."""
    prose = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    with GGUFFile.open(demo_model_path) as file:
        return list(Tokenizer.from_gguf(file).encode(prose, add_special_tokens=False))


@pytest.mark.gpu
def test_the_reference_on_a_gpu_is_float32(demo: FloatModel, text_ids: list[int]) -> None:
    """So that it may stand for the one on a CPU, which takes minutes for what is compared here."""
    prompt, output = text_ids[:50], text_ids[50:100]
    on_gpu, on_cpu = (
        reference_logits(reference_model(demo, device), prompt, output) for device in (CUDA, CPU)
    )
    np.testing.assert_allclose(on_gpu, on_cpu, atol=2e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("type_name", ALL_TYPES)
def test_every_type_stays_close_to_float32(
    type_name: str, demo: FloatModel, text_ids: list[int], tmp_path: Path
) -> None:
    path = write_in_type(tmp_path / "m.gguf", demo, Kind[type_name])
    reference = reference_model(read_model(path), CUDA)
    with running_driver(path, ("cuda:0",), max_num_seqs=12, max_num_batched_tokens=512) as driver:
        few = compare(driver, reference, text_ids, FEW_ROWS, chunk_size=400)
        batch = compare(driver, reference, text_ids, A_BATCH, chunk_size=100)
    logger.info("%s: mean KL per token %.2e with 1 to 4 rows, %.2e with 12", type_name, few, batch)
    assert few <= INT8.mean_kl
    assert batch <= INT8.mean_kl


def compare(
    driver: Driver,
    reference: PreTrainedModel,
    text_ids: list[int],
    lengths: Sequence[tuple[int, int]],
    *,
    chunk_size: int,
) -> float:
    """Generate after pieces of the text; assert decided ids; the mean KL per token."""
    starts = range(0, 100 * len(lengths), 100)
    prompts = [
        Prompt(
            token_ids=text_ids[start : start + num_prompt],
            sampling=SamplingParams(max_tokens=num_output, seed=0, temperature=0.0),
        )
        for start, (num_prompt, num_output) in zip(starts, lengths, strict=True)
    ]
    with recorded_logits() as record:
        results = driver.generate(prompts, Schedule(chunk_size=chunk_size, num_cohorts=1))
    last_row = driver.pipeline.facts.num_rows - 1
    ours_TV, theirs_TV = [], []
    for index, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        first, num_output = len(prompt.token_ids), len(result.token_ids)
        ours = record.of_row(last_row - index, first, num_output)
        theirs = torch.from_numpy(reference_logits(reference, prompt.token_ids, result.token_ids))
        ids, decided = decided_tokens(theirs, prompt.sampling, first, INT8.logit_error)
        assert decided.float().mean() > 0.2
        assert torch.equal(torch.tensor(result.token_ids)[decided], ids[decided])
        ours_TV.append(torch.from_numpy(ours))
        theirs_TV.append(theirs)
    ours_all, theirs_all = torch.cat(ours_TV), torch.cat(theirs_TV)
    logger.info("largest error of a margin: %.3f", _margin_errors(ours_all, theirs_all).max())
    return mean_kl(ours_all, theirs_all)


def _margin_errors(ours_TV: torch.Tensor, theirs_TV: torch.Tensor) -> torch.Tensor:
    """How far off the distance of the two likeliest tokens is, in logits."""
    first_T1, second_T1 = theirs_TV.topk(2).indices.split(1, dim=1)
    error_TV = ours_TV - theirs_TV
    return (error_TV.gather(1, first_T1) - error_TV.gather(1, second_T1)).abs()
