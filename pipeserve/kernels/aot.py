"""One kernel specialisation that must compile ahead of time, without a GPU.

Every module of kernels lists its own as AOT_CASES; pipeserve.bench.kernels_aot compiles them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class AotCase:
    """A kernel with the types and constants it is compiled for."""

    name: str
    kernel: Any
    """The @triton.jit function."""
    signature: Mapping[str, str]
    """Run-time argument -> Triton type, such as "*fp16" or "i32". Pointers count as 16-byte
    aligned, integers as any number: "i32:16" is one of multiples of 16."""
    constexprs: Mapping[str, Any]
    """Compile-time argument -> value. One named ASM, where a kernel has it, is set by the target:
    True for NVIDIA, whose PTX the inline assembly is, False for others. PDL likewise: True for
    NVIDIA from sm_90 on."""
    num_warps: int = 4
    num_stages: int = 3
    needs_e4m3: bool = False
    """Only for cards whose tensor cores take e4m3: NVIDIA's from sm_89 on."""
