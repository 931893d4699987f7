"""What a step uploads comes out of the one buffer again, every part of it aligned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeserve.runtime.step_tensors import NUMBERS, Line, StepArrays, upload


@pytest.mark.parametrize("num_rows", range(1, 10))
@pytest.mark.parametrize("num_entries", [0, 1, 6])
def test_parts_come_back_aligned(num_rows: int, num_entries: int) -> None:
    generator = np.random.default_rng(num_rows)
    arrays = StepArrays(
        rows_S=generator.permutation(num_rows).astype(np.int32),
        seeds_S=generator.integers(2**63, size=num_rows),
        positions_S=generator.integers(2**31, size=num_rows, dtype=np.int32),
        numbers_FS=generator.random((len(NUMBERS), num_rows), dtype=np.float32).view(np.int32),
        asked_G=np.arange(num_rows - 1, dtype=np.int32),
        bias_seqs_E=generator.integers(num_rows, size=num_entries, dtype=np.int32),
        bias_ids_E=generator.integers(2**31, size=num_entries, dtype=np.int32),
        bias_values_E=generator.random(num_entries, dtype=np.float32),
    )
    tensors = upload(arrays, torch.device("cpu"))
    bias = tensors.bias()
    parts = [
        (tensors.longs(Line.ROWS), arrays.rows_S),
        (tensors.longs(Line.SEEDS), arrays.seeds_S),
        (tensors.ints(Line.POSITIONS), arrays.positions_S),
        (tensors.ints(Line.ASKED), arrays.asked_G),
        (bias.seqs_E, arrays.bias_seqs_E),
        (bias.ids_E, arrays.bias_ids_E),
        (bias.values_E, arrays.bias_values_E),
    ]
    parts += [
        (tensors.ints(Line(line)), numbers_S)
        for line, numbers_S in zip(NUMBERS, arrays.numbers_FS, strict=True)
    ]
    for part, expected in parts:
        np.testing.assert_array_equal(part.numpy(), expected)
        assert part.data_ptr() % 16 == 0 or len(expected) == 0
    as_float = tensors.floats(Line.FREQUENCY)
    np.testing.assert_array_equal(as_float, arrays.numbers_FS[-1].view(np.float32))
