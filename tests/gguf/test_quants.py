"""dequantise: every block type of the gguf package, and the named error for the others."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from pipeserve.errors import UnsupportedModelError
from pipeserve.gguf.header import TensorInfo
from pipeserve.gguf.quants import can_dequantise, dequantise

Type = gguf.GGMLQuantizationType
ALL_TYPES = [pytest.param(kind, id=kind.name) for kind in Type]
UNKNOWN = {Type.Q8_1, Type.Q8_K, Type.I8, Type.I16, Type.I32, Type.I64}


def info_of(kind: Type, *, rows: int, blocks_per_row: int) -> TensorInfo:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return TensorInfo(
        name="weights",
        shape=(rows, blocks_per_row * block_size),
        type=kind,
        num_bytes=rows * blocks_per_row * block_bytes,
        shard=Path("model.gguf"),
        offset=0,
    )


@pytest.mark.parametrize("kind", ALL_TYPES)
def test_random_blocks_of_every_type(kind: Type) -> None:
    info = info_of(kind, rows=3, blocks_per_row=2)
    raw = np.random.default_rng(0).integers(0, 256, (3, info.num_bytes // 3), dtype=np.uint8)
    raw.flags.writeable = False
    if not can_dequantise(kind):
        with pytest.raises(UnsupportedModelError, match=f"tensor weights has type {kind.name}"):
            dequantise(info, raw)
        return
    values = dequantise(info, raw)
    assert values.shape == info.shape
    assert values.dtype == np.float32
    assert values.flags.writeable
    assert not np.shares_memory(values, raw)


def test_types_that_models_use_are_known() -> None:
    for name in "F32 F16 BF16 F64 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K".split():
        assert can_dequantise(Type[name]), name
    for name in "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS MXFP4".split():
        assert can_dequantise(Type[name]), name
    assert not any(can_dequantise(kind) for kind in UNKNOWN)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.F64, Type.F32], ids=lambda t: t.name)
def test_plain_numbers_keep_their_values(kind: Type) -> None:
    values = np.array([[0.5, -2.0, 1024.0, 0.0]], dtype=np.float32)
    if kind == Type.F64:
        raw = values.astype(np.float64).view(np.uint8)
    else:
        raw = np.ascontiguousarray(gguf.quants.quantize(values, kind)).view(np.uint8)
    info = info_of(kind, rows=1, blocks_per_row=4)
    np.testing.assert_array_equal(dequantise(info, raw), values)


def test_a_q8_block_by_hand() -> None:
    """Q8_0: a half-precision scale, then 32 signed bytes."""
    scale = np.array([0.25], dtype=np.float16).view(np.uint8)
    levels = np.arange(-16, 16, dtype=np.int8)
    raw = np.concatenate([scale, levels.view(np.uint8)])[None, :]
    info = info_of(Type.Q8_0, rows=1, blocks_per_row=1)
    np.testing.assert_array_equal(dequantise(info, raw)[0], levels * np.float32(0.25))
