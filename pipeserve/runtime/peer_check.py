"""Whether copies straight from one card to another arrive as they were sent.

Some cards report that they can, report success, and deliver something else (NVIDIA's
open-gpu-kernel-modules issue 1257, pytorch issue 132397), so it is tried at load.
"""

from __future__ import annotations

import torch

SIZES = (4096, 256 * 1024, 64 * 1024**2)
"""Bytes: small copies and large ones may take different ways."""


def copies_arrive(source: torch.device, target: torch.device) -> bool:
    """Send random bytes of a few sizes from card to card and compare them on the host."""
    generator = torch.Generator().manual_seed(0)
    return all(_arrives(source, target, size, generator) for size in SIZES)


def _arrives(
    source: torch.device, target: torch.device, num_bytes: int, generator: torch.Generator
) -> bool:
    words = torch.randint(-(2**63), 2**63 - 1, (num_bytes // 8,), generator=generator)
    sent = words.view(torch.uint8)  # several times faster than to draw bytes
    on_source = sent.to(source)
    on_target = torch.zeros(num_bytes, dtype=torch.uint8, device=target)
    torch.cuda.synchronize(target)
    on_target.copy_(on_source, non_blocking=True)
    torch.cuda.synchronize(source)
    torch.cuda.synchronize(target)
    return torch.equal(on_target.cpu(), sent)
