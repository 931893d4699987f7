"""A stage's paged KV cache: how many blocks fit its memory, and the tensors themselves.

Every stage holds its own layers' keys and values under the same block ids.
Shapes: B blocks, P position in block, K kv heads, H head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pipeserve.errors import ConfigError
from pipeserve.models.config import ModelConfig
from pipeserve.models.layers import LayerCache

DEFAULT_CPU_BYTES = 1024**3
"""KV cache of a CPU stage where kv_cache_bytes is left out."""

SCALE_DTYPE = torch.float16
"""Of int8 keys and values: one scale per token and kv head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What the cache must hold: as many rows as run at once, each up to a whole context."""

    num_rows: int
    context_length: int
    block_size: int

    @property
    def blocks_per_row(self) -> int:
        return -(-self.context_length // self.block_size)

    @property
    def most_blocks(self) -> int:
        """More could never be in use."""
        return self.num_rows * self.blocks_per_row


def storage_dtype(option: Literal["auto", "int8"], activations: torch.dtype) -> torch.dtype:
    """Type of the cached keys and values under kv_cache_dtype."""
    return torch.int8 if option == "int8" else activations


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block in one layer: keys and values, and the scales of int8 ones."""
    scale_bytes = SCALE_DTYPE.itemsize * config.num_kv_heads if dtype == torch.int8 else 0
    return 2 * block_size * (config.kv_size * dtype.itemsize + scale_bytes)


def count_blocks(shape: KVShape, *, bytes_per_block: int, kv_cache_bytes: int) -> int:
    """Blocks that fit kv_cache_bytes, where one takes bytes_per_block over all of a stage's layers.

    Raises:
        ConfigError: not one block fits.
    """
    num_blocks = kv_cache_bytes // bytes_per_block
    if num_blocks < 1:
        raise ConfigError(
            f"kv_cache_bytes is {kv_cache_bytes}, but one block of {shape.block_size} tokens takes "
            f"{bytes_per_block} bytes on a stage; raise kv_cache_bytes or lower block_size"
        )
    return min(num_blocks, shape.most_blocks)


def allocate(
    config: ModelConfig,
    *,
    num_layers: int,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[LayerCache, ...]:
    """Zeroed caches [B, P, K, H], and for int8 their scales [B, K, P]: one set per layer.

    Zeroed, because masked attention still multiplies what it hides by 0.
    """
    shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
    scale_shape = (num_blocks, config.num_kv_heads, block_size)

    def layer_cache() -> LayerCache:
        k_BPKH, v_BPKH = (_zeros(shape, dtype, device) for _ in "kv")
        if dtype != torch.int8:
            return LayerCache(k_BPKH=k_BPKH, v_BPKH=v_BPKH)
        k_scale_BKP, v_scale_BKP = (_zeros(scale_shape, SCALE_DTYPE, device) for _ in "kv")
        return LayerCache(
            k_BPKH=k_BPKH, v_BPKH=v_BPKH, k_scale_BKP=k_scale_BKP, v_scale_BKP=v_scale_BKP
        )

    return tuple(layer_cache() for _ in range(num_layers))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros take memory only once they are written to, torch's at once.
    zero_bytes = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(zero_bytes).view(dtype).view(shape)
