"""Block hashes: names for the content of KV blocks, each depending on all tokens before it.

Used by the prefix cache and by the choice of a replica. Pure functions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def root_hash(salt: str) -> bytes:
    """What the first block's name depends on.

    One cache belongs to one pipeline, hence to one model and one KV type; only salts differ in it.
    """
    return hashlib.sha256(b"pipeserve prefix\0" + salt.encode()).digest()


def extend_hashes(
    hashes: list[bytes], token_ids: Sequence[int], *, block_size: int, count: int, root: bytes
) -> None:
    """Append names until there are `count`, for the first blocks of token_ids.

    SHA-256, since whoever finds two prompts with the same name reads another's keys and values.
    """
    first = len(hashes) * block_size
    data = np.array(token_ids[first : count * block_size], np.int32).tobytes()
    previous, width = hashes[-1] if hashes else root, 4 * block_size
    for start in range(0, len(data) - width + 1, width):
        previous = hashlib.sha256(previous + data[start : start + width]).digest()
        hashes.append(previous)


def hash_blocks(
    token_ids: Sequence[int], block_size: int, *, salt: str = "", max_blocks: int | None = None
) -> list[bytes]:
    """One name for each whole block of the prompt, at most max_blocks from its start."""
    count = len(token_ids) // block_size
    if max_blocks is not None:
        count = min(count, max_blocks)
    hashes: list[bytes] = []
    extend_hashes(hashes, token_ids, block_size=block_size, count=count, root=root_hash(salt))
    return hashes
