"""The architectures that are built in, and the check of a file against its own.

A new family is one file beside llama.py and one entry here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pipeserve.errors import (
    GGUFFormatError,
    MissingTensorError,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from pipeserve.gguf.quants import can_dequantise
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models import llama
from pipeserve.models.config import ModelConfig
from pipeserve.models.layers import Decoder
from pipeserve.models.loader import LayerRange, WeightReader

_LAYER_TENSOR = re.compile(r"blk\.(\d{1,9})\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How models of one kind are recognised, checked and loaded."""

    read_config: Callable[[GGUFFile], ModelConfig]
    required_tensors: Callable[[ModelConfig], dict[str, tuple[int, ...]]]
    optional_tensors: Callable[[ModelConfig], dict[str, tuple[int, ...]]]
    load: Callable[[ModelConfig, LayerRange, WeightReader], Decoder]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(
            read_config=llama.read_llama_config,
            required_tensors=llama.required_tensors,
            optional_tensors=llama.optional_tensors,
            load=llama.load_llama,
        ),
    }
)
"""By the value of general.architecture."""


def check_model(gguf_file: GGUFFile) -> ModelConfig:
    """Check everything that the header shows, before any weight is read.

    Raises:
        UnsupportedModelError: the architecture, an option of it or a tensor's type is not built in.
        MissingTensorError: a tensor that the architecture needs is not in the file.
        GGUFFormatError: metadata are missing or contradict themselves or a tensor's shape.
        VocabularyMismatchError: the tokenizer and the embedding have different sizes.
    """
    family = find_family(gguf_file)
    config = family.read_config(gguf_file)
    _check_layers(gguf_file, config)
    _check_vocabulary(gguf_file)
    required = family.required_tensors(config)
    for name, shape in required.items():
        if name not in gguf_file.tensors:
            raise MissingTensorError(
                gguf_file.path,
                f"lacks the tensor {name}, which the architecture {config.architecture} needs; "
                "the file is incomplete, fetch or convert it again",
            )
        _check_tensor(gguf_file, name, shape)
    for name, shape in family.optional_tensors(config).items():
        if name in gguf_file.tensors:
            _check_tensor(gguf_file, name, shape)
    return config


def find_family(gguf_file: GGUFFile) -> Family:
    """Raises UnsupportedModelError where the architecture is not built in."""
    architecture = gguf_file.metadata_str("general.architecture")
    family = FAMILIES.get(architecture)
    if family is None:
        raise UnsupportedModelError(
            gguf_file.path,
            f"the architecture {architecture} is not built in; known: {', '.join(FAMILIES)}",
        )
    return family


def _check_layers(gguf_file: GGUFFile, config: ModelConfig) -> None:
    """Before names are made of the number: it may be absurd, or hide layers that are there."""
    key, num_layers = f"{config.architecture}.block_count", config.num_layers
    if num_layers > len(gguf_file.tensors):
        raise GGUFFormatError(
            gguf_file.path, f"{key} is {num_layers}, but there are no tensors of so many layers"
        )
    for name in gguf_file.tensors:
        match = _LAYER_TENSOR.match(name)
        if match is not None and int(match[1]) >= num_layers:
            raise GGUFFormatError(
                gguf_file.path,
                f"{key} is {num_layers}, but the file has the tensor {name}, which would be left "
                "out; convert the model again",
            )


def _check_vocabulary(gguf_file: GGUFFile) -> None:
    embedding = gguf_file.tensors.get("token_embd.weight")
    if embedding is None or "tokenizer.ggml.tokens" not in gguf_file.metadata:
        return  # the check of tensors, or the tokenizer, says what is missing
    num_tokens = len(gguf_file.metadata_strings("tokenizer.ggml.tokens"))
    if num_tokens != embedding.shape[0]:
        raise VocabularyMismatchError(
            gguf_file.path,
            f"tokenizer.ggml.tokens lists {num_tokens} tokens, but token_embd.weight has "
            f"{embedding.shape[0]} rows; the tokenizer is another model's",
        )


def _check_tensor(gguf_file: GGUFFile, name: str, shape: tuple[int, ...]) -> None:
    info = gguf_file.tensors[name]
    if info.shape != shape:
        raise GGUFFormatError(
            gguf_file.path,
            f"the tensor {name} has the shape {list(info.shape)}, but the metadata ask for "
            f"{list(shape)}",
        )
    if not can_dequantise(info.type):
        raise UnsupportedModelError(
            gguf_file.path,
            f"the tensor {name} has the type {info.type.name}, which cannot be dequantised; "
            "take a file with another quantisation",
        )
