"""Kernel tests run on the GPU where there is one, and in Triton's interpreter elsewhere."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads this when it is imported, so no test may import it sooner.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_itemcollected(item: pytest.Item) -> None:
    # The interpreter holds scalars as arrays of one element, which numpy is about to forbid.
    item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"))
