"""A stage's paged KV cache: how many blocks fit its memory, and the tensors themselves.

Every stage holds its own layers' keys and values under the same block ids.
Shapes: B blocks, P position in block, K kv heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipeserve.errors import ConfigError
from pipeserve.models.config import ModelConfig
from pipeserve.models.layers import LayerCache

DEFAULT_CPU_BYTES = 1024**3
"""KV cache of a CPU stage where kv_cache_bytes is left out."""

GPU_MARGIN_BYTES = 2 * 1024**3
"""What a GPU keeps free for activations, workspaces and the driver."""


def default_bytes(device: torch.device, *, weight_bytes: int, num_sharing: int) -> int:
    """KV cache of one stage where kv_cache_bytes is left out.

    On a GPU: what is free now, less this and its num_sharing stages' weights and a margin, shared
    evenly. weight_bytes: of one stage.

    Raises:
        ConfigError: the weights leave no room.
    """
    if device.type == "cpu":
        return DEFAULT_CPU_BYTES
    free, total = torch.cuda.mem_get_info(device)
    room = free // num_sharing - weight_bytes - GPU_MARGIN_BYTES // num_sharing
    if room <= 0:
        raise ConfigError(
            f"{device} has {free} of {total} bytes free; a stage's weights take {weight_bytes} and "
            f"{GPU_MARGIN_BYTES} stay free as a margin: no room is left for the KV cache. Take "
            "more devices or a smaller quantisation"
        )
    return room


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


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block in one layer: keys and values."""
    return 2 * block_size * config.kv_size * dtype.itemsize


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
    """Zeroed caches [B, P, K, H], one pair per layer.

    Zeroed, because masked attention still multiplies what it hides by 0.
    """
    shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)

    def zeros() -> torch.Tensor:
        if device.type == "cpu":
            # numpy's zeros take memory only once they are written to, torch's at once.
            return torch.from_numpy(np.zeros(shape, dtype=np.float32)).to(dtype)
        return torch.zeros(shape, dtype=dtype, device=device)

    return tuple(LayerCache(k_BPKH=zeros(), v_BPKH=zeros()) for _ in range(num_layers))
