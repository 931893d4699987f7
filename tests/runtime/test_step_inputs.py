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
    FROM_POOL,
    PADDING,
    StepInputs,
    StepShape,
    decode_shape,
    exact_shape,
    pack,
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
        "rows_T": [0, 1, 2, 2, 2, 3, 3],
        "positions_T": [10, 11, 0, 1, 2, 3, 4],
        "token_ids_T": [FROM_POOL, FROM_POOL, 100, 101, 102, 103, 104],
        "lengths_R": [11, 12],
        "chunk_rows_C": [2, 3],
        "chunk_starts_C": [2, 5],
        "chunk_first_positions_C": [0, 3],
        "chunk_num_tokens_C": [3, 2],
        "sampled_tokens_N": [0, 1, 6],
    }


def test_fields_with_fillers() -> None:
    batch = make_batch(1, [2], [True])
    shape = StepShape(num_tokens=5, num_decode_rows=3, num_chunks=2, num_samples=4)
    assert views(batch, shape) == {
        "rows_T": [0, 1, 1, 0, 0],
        "positions_T": [10, 0, 1, PADDING, PADDING],
        "token_ids_T": [FROM_POOL, 100, 101, 0, 0],
        "lengths_R": [11, 0, 0],
        "chunk_rows_C": [1, 0],
        "chunk_starts_C": [1, 0],
        "chunk_first_positions_C": [0, 0],
        "chunk_num_tokens_C": [2, 0],
        "sampled_tokens_N": [0, 2, 0, 0],
    }


def test_decode_rows_alone_have_two_fields() -> None:
    fields = views(make_batch(2, [], []), decode_shape(3))
    assert fields.pop("rows_T") == [0, 1, 0]
    assert fields.pop("positions_T") == [10, 11, PADDING]
    assert not any(fields.values())


@st.composite
def batches(draw: st.DrawFn) -> MicroBatch:
    num_decode = draw(st.integers(0, 40))
    chunks = draw(st.lists(st.integers(1, 200), min_size=not num_decode, max_size=40 - num_decode))
    samples = draw(st.lists(st.booleans(), min_size=len(chunks), max_size=len(chunks)))
    return make_batch(num_decode, chunks, samples)


@given(batches())
def test_every_shape_holds_its_step(batch: MicroBatch) -> None:
    shapes = GpuShapes(num_rows=40, max_batch_tokens=10_000)
    num_chunks = batch.num_rows - batch.num_decode_rows
    captured = shapes.find_captured(batch)
    assert captured is not None
    assert captured in shapes.captured()
    for shape in (shapes.find(batch), captured):
        assert shape.num_tokens >= batch.num_tokens
        assert shape.num_decode_rows >= batch.num_decode_rows
        assert shape.num_chunks >= num_chunks
        assert shape.has_prefill == (num_chunks > 0)
        if num_chunks > 0:
            assert shape.num_samples >= batch.samples_S.sum()
            assert shape.num_decode_rows <= shape.num_tokens


def test_too_many_prompts_at_once_have_no_captured_shape() -> None:
    shapes = GpuShapes(num_rows=200, max_batch_tokens=512)
    assert shapes.find_captured(make_batch(3, [2] * 33, [True] * 33)) is None
    shape = shapes.find(make_batch(3, [2] * 33, [True] * 33))
    assert shape.num_chunks >= 33
    assert shape.num_tokens == 128


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 9, 24, 256])
def test_captured_shapes_begin_with_the_largest_and_fit_the_rows(num_rows: int) -> None:
    shapes = GpuShapes(num_rows=num_rows, max_batch_tokens=300).captured()
    assert len(set(shapes)) == len(shapes)
    tokens = [shape.num_tokens for shape in shapes]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] == 320
    assert {decode_shape(rows) for rows in {1, num_rows}} <= set(shapes)


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
