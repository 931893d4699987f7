"""Planar layouts of GGUF's quantised matrices: what lies where on the device, per type.

Knows no files and no kernels: types go by their GGUF name. Every weight is
scale * (code - offset) - minimum.

A row's codes lie in planes of 32 bytes, which kernels read without ever interleaving: byte i of a
plane of b-bit codes holds the codes i, 32 + i, 64 + i, ... of its weights, from the lowest bits up.
So 4-bit planes repeat every 64 weights, 2-bit ones every 128, 1-bit ones every 256, and 8-bit codes
are plain; codes of 3, 5 and 6 bits are cut into a low and a high plane. Scales stay what the file
has (half precision, or small integers under a half-precision scale per 256), gathered into one word
per unit of 64 weights. All is row-major: in the kernel for few rows neighbouring threads run along
a row, and the one for batches finds a row's next words in the cache line it has.

    type    bits/weight  of the file's      type    bits/weight  of the file's
    Q4_0    4.5          1.000              Q2_K    2.625        1.000
    Q4_1    5.0          1.000              Q3_K    3.5625       1.036
    Q5_0    5.5          1.000              Q4_K    4.625        1.028
    Q5_1    6.0          1.000              Q5_K    5.625        1.023
    Q8_0    8.5          1.000              Q6_K    6.5625       1.000
    IQ4_NL  4.5          1.000              IQ4_XS  4.3125       1.015
    MXFP4   4.25         1.000

Rows are padded to whole planes: nothing for rows of a multiple of 256 weights; Q5_0 with 576
columns becomes 1.06. F16, BF16 and F32 need no layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import Tensor

PLANE_BYTES = 32
UNIT = 64
"""Weights that one word of scales covers."""

ScaleKind = Literal["half", "half_min", "power", "u8_min", "i8", "i8_pair", "nibble_min"]
"""What a unit's word holds, from its lowest bits up, in the order of the columns.
half: 2 scales f16. half_min: the same, and 2 minima f16 in a second word. power: 2 exponents
(e8m0). u8_min: 2 scales, then 2 minima, u8. i8: 4 scales. i8_pair: 2 scales. nibble_min: 4 bytes of
scale and (high nibble) minimum. The last four are multiples of the super scales of 256 weights."""

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the e2m1 values of OCP's microscaling format; the scale is halved to match."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantLayout:
    """How one GGUF type lies in the file (blocks) and on the device (planes and words)."""

    block_size: int
    block_bytes: int
    low_bits: int
    high_bits: int = 0
    group_size: int
    """Columns that share a scale: 16 or 32."""
    scale_kind: ScaleKind
    offset: int = 0
    table: tuple[int, ...] | None = None
    """Where given, the code is an index into these signed bytes."""

    @property
    def has_min(self) -> bool:
        return self.scale_kind.endswith("_min")

    @property
    def word_bytes(self) -> int:
        """Of a unit's word of scales."""
        return 2 if self.scale_kind in ("power", "i8_pair") else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanarWeight:
    """A matrix of N outputs and K inputs; U = K / 64 rounded up. Contiguous, on one device."""

    type_name: str
    num_rows: int
    num_columns: int
    low: Tensor
    """uint8 [N, bytes]: the plane of low_bits. Eight bits: signed bytes."""
    high: Tensor | None
    """uint8 [N, bytes]: the plane of high_bits."""
    scales: Tensor
    """int32, for power and i8_pair int16, [N, U]: words as ScaleKind says."""
    mins: Tensor | None
    """int32 [N, U] for half_min: minima, as they are subtracted."""
    supers: Tensor | None
    """[N, K / 256]: f16 d and dmin in an int32 where has_min, else d in an int16."""
    dense_NK: Tensor | None = None
    """The same matrix dequantised, where it is kept beside for large batches."""
    is_paired: bool = False
    """Whether the rows are those of gate and up in the order of paired_rows.py."""

    @property
    def layout(self) -> QuantLayout:
        return LAYOUTS[self.type_name]

    @property
    def num_bytes(self) -> int:
        tensors = (self.low, self.high, self.scales, self.mins, self.supers, self.dense_NK)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


LAYOUTS: Mapping[str, QuantLayout] = MappingProxyType(
    {
        "Q4_0": QuantLayout(
            block_size=32, block_bytes=18, low_bits=4, group_size=32, scale_kind="half", offset=8
        ),
        "Q4_1": QuantLayout(
            block_size=32, block_bytes=20, low_bits=4, group_size=32, scale_kind="half_min"
        ),
        "Q5_0": QuantLayout(
            block_size=32,
            block_bytes=22,
            low_bits=4,
            high_bits=1,
            group_size=32,
            scale_kind="half",
            offset=16,
        ),
        "Q5_1": QuantLayout(
            block_size=32,
            block_bytes=24,
            low_bits=4,
            high_bits=1,
            group_size=32,
            scale_kind="half_min",
        ),
        "Q8_0": QuantLayout(
            block_size=32, block_bytes=34, low_bits=8, group_size=32, scale_kind="half"
        ),
        "Q2_K": QuantLayout(
            block_size=256, block_bytes=84, low_bits=2, group_size=16, scale_kind="nibble_min"
        ),
        "Q3_K": QuantLayout(
            block_size=256,
            block_bytes=110,
            low_bits=2,
            high_bits=1,
            group_size=16,
            scale_kind="i8",
            offset=4,
        ),
        "Q4_K": QuantLayout(
            block_size=256, block_bytes=144, low_bits=4, group_size=32, scale_kind="u8_min"
        ),
        "Q5_K": QuantLayout(
            block_size=256,
            block_bytes=176,
            low_bits=4,
            high_bits=1,
            group_size=32,
            scale_kind="u8_min",
        ),
        "Q6_K": QuantLayout(
            block_size=256,
            block_bytes=210,
            low_bits=4,
            high_bits=2,
            group_size=16,
            scale_kind="i8",
            offset=32,
        ),
        "IQ4_NL": QuantLayout(
            block_size=32,
            block_bytes=18,
            low_bits=4,
            group_size=32,
            scale_kind="half",
            table=IQ4_VALUES,
        ),
        "IQ4_XS": QuantLayout(
            block_size=256,
            block_bytes=136,
            low_bits=4,
            group_size=32,
            scale_kind="i8_pair",
            table=IQ4_VALUES,
        ),
        "MXFP4": QuantLayout(
            block_size=32,
            block_bytes=17,
            low_bits=4,
            group_size=32,
            scale_kind="power",
            table=MXFP4_VALUES,
        ),
    }
)
"""By GGUF type name. Block formats: ggml-common.h of llama.cpp, as the gguf package reads them."""


def planar_bytes(type_name: str, num_rows: int, num_columns: int) -> int:
    """What PlanarWeight.num_bytes of a matrix [N, K] will be."""
    layout = LAYOUTS[type_name]
    num_units = -(-num_columns // UNIT)
    row_bytes = num_units * layout.word_bytes
    for bits in (layout.low_bits, layout.high_bits):
        if bits:
            plane_weights = max(UNIT, PLANE_BYTES * 8 // bits)
            row_bytes += -(-num_columns // plane_weights) * plane_weights * bits // 8
    if layout.scale_kind == "half_min":
        row_bytes += num_units * 4
    if layout.block_size == 256:
        row_bytes += num_columns // 256 * (4 if layout.has_min else 2)
    return num_rows * row_bytes
