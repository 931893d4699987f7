"""Sources of the CUDA C++ kernels for Hopper, with the instructions that they share."""

from __future__ import annotations

from pathlib import Path


def hopper_source(name: str) -> str:
    """A file of this folder, hopper_ptx.cu in place of its line // HOPPER."""
    folder = Path(__file__).parent
    text, shared = ((folder / each).read_text() for each in (name, "hopper_ptx.cu"))
    assert text.count("// HOPPER\n") == 1, f"{name} says where they go"
    return text.replace("// HOPPER\n", shared)
