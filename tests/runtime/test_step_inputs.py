"""Padded shapes: fillers change nothing, and every step finds a shape that holds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeserve.core.batch import MicroBatch, PipelineFacts
from pipeserve.core.sampling import SamplingParams
from pipeserve.runtime import gpu_shapes, stage_parts
from pipeserve.runtime.gpu_shapes import GpuShapes
from pipeserve.runtime.step_inputs import (
    PADDING,
    StepInputs,
    StepShape,
    exact_shape,
    pack,
    spread,
    without_fillers,
)
from tests.models import tiny
from tests.models.agreement import assert_same_output
from tests.runtime.driver import Prompt, Schedule, running_driver


def make_batch(num_decode: int, chunks: list[int], samples: list[bool]) -> MicroBatch:
    """Rows 0, 1, ...: decode rows at positions 10, 11, ...; chunk i begins at position 3 * i."""
    num_rows = num_decode + len(chunks)
    none = np.zeros(0, dtype=np.int32)
    first = [10 + row for row in range(num_decode)] + [3 * i for i in range(len(chunks))]
    return MicroBatch(
        step_id=0,
        num_decode_rows=num_decode,
        rows_S=np.arange(num_rows, dtype=np.int32),
        first_positions_S=np.array(first, dtype=np.int32),
        num_tokens_S=np.array([1] * num_decode + chunks, dtype=np.int32),
        samples_S=np.array([True] * num_decode + samples, dtype=np.bool_),
        prefill_token_ids=np.arange(100, 100 + sum(chunks), dtype=np.int32),
        starts=(),
        block_rows=none,
        block_columns=none,
        block_ids=none,
        needs_step=None,
    )


def views(batch: MicroBatch, shape: StepShape) -> dict[str, list[int]]:
    inputs = StepInputs.of(pack(batch, shape), shape)
    return {name: getattr(inputs, name).tolist() for name in StepInputs.__slots__}


def test_fields_without_fillers() -> None:
    batch = make_batch(2, [3, 2], [False, True])
    assert views(batch, exact_shape(batch)) == {
        "rows_S": [0, 1],
        "positions_S": [10, 11],
        "prefill_ids_T": [100, 101, 102, 103, 104],
        "prefill_rows_T": [2, 2, 2, 3, 3],
        "prefill_positions_T": [0, 1, 2, 3, 4],
        "chunk_rows_C": [2, 3],
        "chunk_first_positions_C": [0, 3],
        "chunk_num_tokens_C": [3, 2],
        "sampled_tokens_N": [0, 1, 6],
    }


def test_fields_with_fillers() -> None:
    batch = make_batch(1, [2], [True])
    shape = StepShape(num_decode_rows=3, num_prefill_tokens=4, num_chunks=2, num_samples=4)
    assert views(batch, shape) == {
        "rows_S": [0, 0, 0],
        "positions_S": [10, PADDING, PADDING],
        "prefill_ids_T": [100, 101, 0, 0],
        "prefill_rows_T": [1, 1, 0, 0],
        "prefill_positions_T": [0, 1, PADDING, PADDING],
        "chunk_rows_C": [1, 0],
        "chunk_first_positions_C": [0, 0],
        "chunk_num_tokens_C": [2, 0],
        "sampled_tokens_N": [0, 4, 0, 0],
    }


@st.composite
def batches(draw: st.DrawFn) -> MicroBatch:
    num_decode = draw(st.integers(0, 40))
    chunks = draw(st.lists(st.integers(1, 200), min_size=not num_decode, max_size=40 - num_decode))
    samples = draw(st.lists(st.booleans(), min_size=len(chunks), max_size=len(chunks)))
    return make_batch(num_decode, chunks, samples)


@given(batches())
def test_hidden_states_come_back_from_every_shape(batch: MicroBatch) -> None:
    shapes = GpuShapes(num_rows=40, max_batch_tokens=10_000)
    hidden_TD = torch.arange(1.0, batch.num_tokens + 1).unsqueeze(1)
    for shape in (shapes.find(batch), shapes.find_captured(batch)):
        if shape is None:
            continue
        assert shape.num_decode_rows >= batch.num_decode_rows
        assert shape.num_chunks >= batch.num_rows - batch.num_decode_rows
        padded_TD = spread(hidden_TD, batch, shape, out_TD=torch.zeros(shape.num_tokens, 1))
        assert torch.equal(without_fillers(padded_TD, batch, shape), hidden_TD)
        ends = np.cumsum(batch.num_tokens_S)[batch.samples_S]
        sampled = views(batch, shape)["sampled_tokens_N"][: len(ends)]
        if len(batch.prefill_token_ids) > 0:
            assert padded_TD[sampled, 0].tolist() == ends.tolist()


@given(batches())
def test_small_steps_have_a_captured_shape(batch: MicroBatch) -> None:
    shapes = GpuShapes(num_rows=40, max_batch_tokens=10_000)
    shape = shapes.find_captured(batch)
    num_chunks = batch.num_rows - batch.num_decode_rows
    assert (shape is None) == (len(batch.prefill_token_ids) > 512 or num_chunks > 32)
    assert shape is None or shape in shapes.captured()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 9, 24, 256])
def test_captured_shapes_begin_with_the_largest_and_fit_the_rows(num_rows: int) -> None:
    shapes = GpuShapes(num_rows=num_rows, max_batch_tokens=256).captured()
    assert len(set(shapes)) == len(shapes)
    assert max(shape.num_prefill_tokens for shape in shapes) == 256
    tokens = [shape.num_tokens for shape in shapes]
    assert tokens == sorted(tokens, reverse=True)
    assert {StepShape(num_decode_rows=rows) for rows in {1, num_rows}} <= set(shapes)


def always_padded(device: torch.device, facts: PipelineFacts) -> GpuShapes:
    return GpuShapes(num_rows=facts.num_rows, max_batch_tokens=facts.max_batch_tokens)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_padded_steps_give_the_same_output(
    num_stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write_gguf(tmp_path / "tiny.gguf", tiny.random_llama(tiny.llama_config()))
    rng = np.random.default_rng(1)
    prompts = [
        Prompt(
            token_ids=rng.integers(0, 300, length).tolist(),
            sampling=SamplingParams(max_tokens=12, seed=0, temperature=0.0, num_logprobs=2),
        )
        for length in (1, 5, 30, 17)
    ]
    schedule = Schedule(chunk_size=16, num_cohorts=num_stages)
    with running_driver(path, ("cpu",) * num_stages) as driver:
        expected = driver.generate(prompts, schedule)
    assert stage_parts.shapes_for is gpu_shapes.shapes_for
    monkeypatch.setattr(stage_parts, "shapes_for", always_padded)
    with running_driver(path, ("cpu",) * num_stages) as driver:
        results = driver.generate(prompts, schedule)
    for result, baseline in zip(results, expected, strict=True):
        assert_same_output(result, baseline)
