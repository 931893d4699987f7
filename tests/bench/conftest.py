"""Commands run in this process here; what they set for the whole process is put back. Without a GPU
kernels run in Triton's interpreter."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import structlog
import torch

# Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def logging_put_back() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
