"""Random GGUF blocks whose scales are of a real model's size, for the tests of the quant family."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import torch

from pipeserve.kernels.quant_layout import LAYOUTS, PlanarWeight
from pipeserve.kernels.quant_repack import repack

HALF_OFFSETS: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,),
    "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip
"""Where a block holds f16 scales and minima."""


def random_blocks(
    type_name: str, num_rows: int, num_columns: int, seed: int = 0
) -> npt.NDArray[np.uint8]:
    """[N, bytes of a row]: every bit of the codes and small scales random."""
    layout = LAYOUTS[type_name]
    rng = np.random.default_rng(seed)
    shape = (num_rows, num_columns // layout.block_size, layout.block_bytes)
    blocks = rng.integers(0, 256, shape, dtype=np.uint8)
    for offset in HALF_OFFSETS[type_name]:
        halves = (rng.standard_normal(shape[:2]) * 0.01).astype(np.float16)
        blocks[:, :, offset : offset + 2] = halves[..., None].view(np.uint8)
    if type_name == "MXFP4":
        blocks[:, :, 0] = rng.integers(116, 124, shape[:2])
    return blocks.reshape(num_rows, -1)


def random_weight(
    type_name: str, num_rows: int, num_columns: int, device: torch.device
) -> PlanarWeight:
    return repack(
        torch.from_numpy(random_blocks(type_name, num_rows, num_columns)).to(device), type_name
    )


def gguf_values(type_name: str, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name])


def whole_columns(type_name: str) -> int:
    """The columns nearest above 512 that are no whole planes of the type, where it allows that."""
    return 576 if LAYOUTS[type_name].block_size == 32 else 768


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).norm() / wanted.norm()).item()
