"""Programmatic dependent launch: a kernel starts while the one before it in its stream still runs.

Used by the kernels of a step, on the stage thread; capturable in a CUDA graph. On NVIDIA
cards from compute capability 9.0 on; elsewhere nothing of it is compiled.

Three rules make it safe. Every program of such a kernel waits, also one that has nothing to do: so
a kernel that has ended says that all before it have. Before it waits, it writes nothing, and reads
only what was there when the model was loaded or what kernels in front of the last plain launch have
written: rotary_angles is launched plainly, behind what says where a step's rows stand. It lets the
next kernel start at any time. Two products by one x bend the second rule (quant_mma.cu): the first
lets the second start when its own wait is over; that one reads and writes at once, and waits last.
(PTX: griddepcontrol; the CUDA programming guide, programmatic dependent launch.)
"""

# Triton's decorator and its functions' arguments have no types to annotate.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def start_next_kernel(PDL: tl.constexpr):
    """Let the next kernel's programs take the room that this one's leave."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Until the kernel before this one has ended and what it wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


def is_supported(device: torch.device) -> bool:
    """Whether a launch may depend on the one before it."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments for the launch of a kernel that has the constant PDL."""
    return {"PDL": True, "launch_pdl": True} if is_supported(device) else {"PDL": False}
