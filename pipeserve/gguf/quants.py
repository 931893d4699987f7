"""Reference dequantisation of GGUF blocks to float32, by the gguf package's formulas (numpy)."""

from __future__ import annotations

from functools import cache

import gguf.quants
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from pipeserve.errors import UnsupportedModelError
from pipeserve.gguf.header import TensorInfo


@cache
def can_dequantise(tensor_type: GGMLQuantizationType) -> bool:
    """Whether dequantise knows blocks of this type."""
    if tensor_type == GGMLQuantizationType.F64:
        return True
    block = np.zeros((1, GGML_QUANT_SIZES[tensor_type][1]), dtype=np.uint8)
    try:
        gguf.quants.dequantize(block, tensor_type)
    except NotImplementedError:
        return False
    return True


def dequantise(info: TensorInfo, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """A new float32 array of info.shape from the tensor's bytes [rows, bytes per row].

    Raises:
        UnsupportedModelError: no formula for this type is built in.
    """
    if not can_dequantise(info.type):
        raise UnsupportedModelError(
            info.shard,
            f"tensor {info.name} has type {info.type.name}, which cannot be dequantised; "
            "take a file with another quantisation",
        )
    # Blocks of a broken file may hold scales that overflow: that is no reason to warn.
    with np.errstate(all="ignore"):
        if info.type == GGMLQuantizationType.F64:
            values = raw.view(np.float64).astype(np.float32)
        else:
            values = gguf.quants.dequantize(raw, info.type)
    if info.type == GGMLQuantizationType.F32:
        values = values.copy()  # the package returns the mapped file itself, which is read-only
    return np.asarray(values, dtype=np.float32).reshape(info.shape)
