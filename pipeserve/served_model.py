"""ServedModel: what the front half knows of the model file, tokenizer and chat template above all.

Loaded on a thread. Must not know stages, scheduling or torch.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import LlamaFileType

from pipeserve import __version__
from pipeserve.config import Config
from pipeserve.gguf.reader import GGUFFile
from pipeserve.hub import resolve_model
from pipeserve.server.model_facts import ModelFacts
from pipeserve.server.state import ModelCard
from pipeserve.text.chat_template import ChatTemplate
from pipeserve.text.grammar import GrammarCompiler
from pipeserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model file on this machine and the text side that goes with it."""

    path: Path
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    card: ModelCard
    grammars: GrammarCompiler


def fetch_model(config: Config) -> ServedModel:
    """Fetch the model where it is not here yet, and read its text side; blocks meanwhile.

    Raises:
        PipeserveError: the model cannot be had, or its text side is not one that is built in.
    """
    path = resolve_model(config.model, cache_dir=config.cache_dir)
    with GGUFFile.open(path) as gguf_file:
        tokenizer = Tokenizer.from_gguf(gguf_file)
        return ServedModel(
            path=path,
            tokenizer=tokenizer,
            chat_template=ChatTemplate.from_gguf(gguf_file, tokenizer),
            card=_model_card(config, gguf_file),
            grammars=GrammarCompiler(lambda: tokenizer, vocab_size=tokenizer.vocab_size),
        )


def _model_card(config: Config, gguf_file: GGUFFile) -> ModelCard:
    """The name that clients use, and a fingerprint of what decides the answers."""
    path = gguf_file.path
    is_name = path.suffix == ".gguf" and not config.model.endswith(".gguf")
    stem = path.stem.split("-00001-of-")[0]
    stat = path.stat()
    identity = f"{__version__} {path.name} {stat.st_size} {stat.st_mtime_ns}"
    return ModelCard(
        name=config.served_model_name or (config.model if is_name else stem),
        created=int(time.time()),
        fingerprint="fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12],
        facts=_model_facts(gguf_file),
    )


def _model_facts(gguf_file: GGUFFile) -> ModelFacts:
    architecture = gguf_file.metadata_str("general.architecture")
    return ModelFacts(
        architecture=architecture,
        quantisation=_quantisation(gguf_file),
        num_parameters=sum(math.prod(info.shape) for info in gguf_file.tensors.values()),
        num_bytes=gguf_file.file_size,
        trained_context=gguf_file.metadata_int(f"{architecture}.context_length", 0),
    )


def _quantisation(gguf_file: GGUFFile) -> str:
    """By general.file_type; where that says nothing, the type of the most numbers."""
    try:
        name = LlamaFileType(
            gguf_file.metadata_int("general.file_type", LlamaFileType.GUESSED)
        ).name
    except ValueError:
        name = LlamaFileType.GUESSED.name
    if name != LlamaFileType.GUESSED.name:
        return name.removeprefix("MOSTLY_").removeprefix("ALL_")
    counts: Counter[str] = Counter()
    for info in gguf_file.tensors.values():
        counts[info.type.name] += math.prod(info.shape)
    return counts.most_common(1)[0][0] if counts else "unknown"
