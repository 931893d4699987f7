"""Repacks raw GGUF blocks into their planar layout, in torch, on the device of the blocks.

Runs once per tensor at load. A few torch passes over the bytes: at a GPU's speed that is far above
a disk's. Block formats: ggml-common.h of llama.cpp, as the gguf package reads them.

Shapes: N rows, J blocks of a row, K columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from pipeserve.kernels.quant_layout import LAYOUTS, PLANE_BYTES, UNIT, PlanarWeight

_WEIGHTS_AT_ONCE = 1 << 24
"""Repacked per pass: bounds the temporary memory to some 200 MB beside a matrix of any size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """Rows taken apart: codes uint8 [N, K], the rest as PlanarWeight has it but not padded."""

    codes: Tensor
    scales: Tensor
    mins: Tensor | None = None
    supers: Tensor | None = None


def repack(raw: Tensor, type_name: str) -> PlanarWeight:
    """uint8 [N, bytes of a row] as in the file -> planar, on the same device."""
    return repack_parts([raw], type_name)


def repack_parts(parts: Sequence[Tensor], type_name: str) -> PlanarWeight:
    """Rows of several tensors of one type, each as repack takes it, as one matrix."""
    layout = LAYOUTS[type_name]
    num_rows, row_bytes = sum(part.shape[0] for part in parts), parts[0].shape[1]
    assert row_bytes % layout.block_bytes == 0, f"{row_bytes} bytes are no whole {type_name} blocks"
    num_columns = row_bytes // layout.block_bytes * layout.block_size
    whole: dict[str, Tensor] = {}
    first = 0
    for chunk in itertools.chain.from_iterable(
        part.split(max(1, _WEIGHTS_AT_ONCE // num_columns)) for part in parts
    ):
        assert chunk.dtype == torch.uint8 and chunk.shape[1] == row_bytes, f"blocks {chunk.shape}"
        for name, tensor in _repack_rows(chunk, type_name).items():
            if name not in whole:
                whole[name] = tensor.new_empty((num_rows, tensor.shape[1]))
            whole[name][first : first + len(chunk)] = tensor
        first += len(chunk)
    return PlanarWeight(
        type_name=type_name,
        num_rows=num_rows,
        num_columns=num_columns,
        low=whole["low"],
        high=whole.get("high"),
        scales=whole["scales"],
        mins=whole.get("mins"),
        supers=whole.get("supers"),
    )


def _repack_rows(raw: Tensor, type_name: str) -> dict[str, Tensor]:
    layout = LAYOUTS[type_name]
    parts = _READERS[type_name](raw.reshape(raw.shape[0], -1, layout.block_bytes))
    num_units = -(-parts.codes.shape[1] // UNIT)
    low_mask = (1 << layout.low_bits) - 1
    planes = {
        "low": _pack(parts.codes & low_mask, layout.low_bits),
        "scales": _words(parts.scales, num_units, layout.word_bytes),
    }
    if layout.high_bits:
        planes["high"] = _pack(parts.codes >> layout.low_bits, layout.high_bits)
    if parts.mins is not None:
        planes["mins"] = _words(parts.mins, num_units, 4)
    if parts.supers is not None:
        planes["supers"] = parts.supers
    return planes


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] -> plane [N, bytes], padded with zeros to whole planes."""
    num_slices = 8 // bits
    plane_weights = max(UNIT, PLANE_BYTES * num_slices)
    codes = functional.pad(codes, (0, -codes.shape[1] % plane_weights))
    if bits == 8:
        return codes
    slices = codes.reshape(codes.shape[0], -1, num_slices, PLANE_BYTES)
    plane = slices[:, :, 0].clone()
    for index in range(1, num_slices):
        plane |= slices[:, :, index] << (bits * index)
    return plane.reshape(codes.shape[0], -1)


def _words(values: Tensor, num_units: int, word_bytes: int) -> Tensor:
    """[N, bytes] -> one int32 or int16 per unit, zeros where padded."""
    padded = functional.pad(values, (0, num_units * word_bytes - values.shape[1]))
    return padded.contiguous().view(torch.int16 if word_bytes == 2 else torch.int32)


def _nibbles(packed: Tensor) -> Tensor:
    """[N, J, B] bytes -> [N, J * 2B]: a block's low nibbles, then its high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1).flatten(1)


def _bits_of(packed: Tensor, bits: int) -> Tensor:
    """[..., B] bytes -> [..., 8 / bits, B]: all lowest bits first."""
    return torch.stack([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], dim=-2)


def _fifth_bits(packed: Tensor) -> Tensor:
    """[N, J, 4] bytes -> [N, J * 32]: column i's bit is bit i of the little-endian word."""
    bits = [packed >> shift & 1 for shift in range(8)]
    return torch.stack(bits, dim=-1).flatten(1)


def _negated(half: Tensor) -> Tensor:
    """f16 bytes [N, J, 2] with the sign turned: legacy minima are added in the file."""
    return half ^ torch.tensor([0, 0x80], dtype=torch.uint8, device=half.device)


def _read_q4_0(blocks: Tensor) -> _Parts:
    return _Parts(codes=_nibbles(blocks[..., 2:]), scales=blocks[..., :2].flatten(1))


def _read_q4_1(blocks: Tensor) -> _Parts:
    return _Parts(
        codes=_nibbles(blocks[..., 4:]),
        scales=blocks[..., :2].flatten(1),
        mins=_negated(blocks[..., 2:4]).flatten(1),
    )


def _read_q5_0(blocks: Tensor) -> _Parts:
    codes = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6]) << 4
    return _Parts(codes=codes, scales=blocks[..., :2].flatten(1))


def _read_q5_1(blocks: Tensor) -> _Parts:
    return _Parts(
        codes=_nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8]) << 4,
        scales=blocks[..., :2].flatten(1),
        mins=_negated(blocks[..., 2:4]).flatten(1),
    )


def _read_q8_0(blocks: Tensor) -> _Parts:
    return _Parts(codes=blocks[..., 2:].flatten(1), scales=blocks[..., :2].flatten(1))


def _read_mxfp4(blocks: Tensor) -> _Parts:
    return _Parts(codes=_nibbles(blocks[..., 1:]), scales=blocks[..., 0])


def _read_q2_k(blocks: Tensor) -> _Parts:
    packed = blocks[..., 16:80].unflatten(-1, (2, 32))
    return _Parts(
        codes=_bits_of(packed, 2).flatten(1),
        scales=blocks[..., :16].flatten(1),
        supers=_half_pair(blocks[..., 80:84]),
    )


def _read_q3_k(blocks: Tensor) -> _Parts:
    """The mask bit 1 means no 4 is subtracted: it is the third bit of a code with offset 4."""
    low = _bits_of(blocks[..., 32:96].unflatten(-1, (2, 32)), 2).flatten(1)
    high = _bits_of(blocks[..., :32], 1).flatten(1)
    packed = blocks[..., 96:108]
    scale_low = torch.cat((packed[..., :8] & 15, packed[..., :8] >> 4), dim=-1)
    scale_high = _bits_of(packed[..., 8:], 2).flatten(-2)
    scales = (scale_low | scale_high << 4) - 32  # wraps to a signed byte
    return _Parts(
        codes=low | high << 2, scales=scales.flatten(1), supers=_half(blocks[..., 108:110])
    )


def _six_bit_pairs(packed: Tensor) -> Tensor:
    """The 12 bytes of Q4_K and Q5_K -> [N, J * 16]: per 64 columns 2 scales, then 2 minima."""
    scale, minimum, rest = packed.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((scale & 63, rest & 15 | scale >> 2 & 48), dim=-1)
    minima = torch.cat((minimum & 63, rest >> 4 | minimum >> 2 & 48), dim=-1)
    pairs = (scales.unflatten(-1, (4, 2)), minima.unflatten(-1, (4, 2)))
    return torch.cat(pairs, dim=-1).flatten(1)


def _read_q4_k(blocks: Tensor) -> _Parts:
    return _Parts(
        codes=_bits_of(blocks[..., 16:144].unflatten(-1, (4, 32)), 4).flatten(1),
        scales=_six_bit_pairs(blocks[..., 4:16]),
        supers=_half_pair(blocks[..., :4]),
    )


def _read_q5_k(blocks: Tensor) -> _Parts:
    low = _bits_of(blocks[..., 48:176].unflatten(-1, (4, 32)), 4).flatten(1)
    high = _bits_of(blocks[..., 16:48], 1).flatten(1)
    return _Parts(
        codes=low | high << 4,
        scales=_six_bit_pairs(blocks[..., 4:16]),
        supers=_half_pair(blocks[..., :4]),
    )


def _read_q6_k(blocks: Tensor) -> _Parts:
    low = _bits_of(blocks[..., :128].unflatten(-1, (2, 64)), 4).flatten(1)
    high = _bits_of(blocks[..., 128:192].unflatten(-1, (2, 32)), 2).flatten(1)
    return _Parts(
        codes=low | high << 4,
        scales=blocks[..., 192:208].flatten(1),
        supers=_half(blocks[..., 208:210]),
    )


def _read_iq4_xs(blocks: Tensor) -> _Parts:
    scale_low = _bits_of(blocks[..., 4:8], 4).transpose(-1, -2).flatten(-2)
    scale_high = _bits_of(blocks[..., 2:4], 2).transpose(-1, -2).flatten(-2)
    scales = (scale_low | scale_high << 4) - 32  # wraps to a signed byte
    return _Parts(
        codes=_bits_of(blocks[..., 8:].unflatten(-1, (8, 16)), 4).flatten(1),
        scales=scales.flatten(1),
        supers=_half(blocks[..., :2]),
    )


def _half(field: Tensor) -> Tensor:
    """[N, J, 2] bytes -> int16 [N, J]."""
    return field.contiguous().view(torch.int16).flatten(1)


def _half_pair(field: Tensor) -> Tensor:
    """[N, J, 4] bytes -> int32 [N, J]."""
    return field.contiguous().view(torch.int32).flatten(1)


_READERS: Mapping[str, Callable[[Tensor], _Parts]] = MappingProxyType(
    {
        "Q4_0": _read_q4_0,
        "Q4_1": _read_q4_1,
        "Q5_0": _read_q5_0,
        "Q5_1": _read_q5_1,
        "Q8_0": _read_q8_0,
        "Q2_K": _read_q2_k,
        "Q3_K": _read_q3_k,
        "Q4_K": _read_q4_k,
        "Q5_K": _read_q5_k,
        "Q6_K": _read_q6_k,
        "IQ4_NL": _read_q4_0,
        "IQ4_XS": _read_iq4_xs,
        "MXFP4": _read_mxfp4,
    }
)
