"""A tokenizer whose tokens are the 256 bytes, for tests that cut text anywhere, and a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeserve.gguf.reader import GGUFFile
from pipeserve.text.tokenizer import Tokenizer
from tests.text.small_vocabularies import write_byte_vocabulary


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Ids 0 to 255 are the bytes, 257 is the control token <|end|>."""
    path = tmp_path_factory.mktemp("bytes") / "bytes.gguf"
    with GGUFFile.open(write_byte_vocabulary(path)) as file:
        return Tokenizer.from_gguf(file)


@pytest.fixture(scope="session")
def demo_tokenizer(demo_model_path: Path) -> Tokenizer:
    with GGUFFile.open(demo_model_path) as file:
        return Tokenizer.from_gguf(file)
