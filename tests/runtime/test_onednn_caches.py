"""What oneDNN keeps of products of ever other sizes, by glibc's own account."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pipeserve.runtime.onednn_caches import MOST_PRODUCTS, bound_onednn_caches
from tests.processes import python_path

VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")

PROGRAM = """
import ctypes, sys
from pipeserve.runtime.onednn_caches import bound_onednn_caches

bound_onednn_caches()
import torch


class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
mallinfo2.restype = Info
torch.set_num_threads(1)
packed = torch.ops.mkldnn._reorder_linear_weight(torch.ones(576, 576), 64)
before = mallinfo2().h
for rows in range(1, 400):
    torch.ops.mkldnn._linear_pointwise(torch.ones(rows, 576), packed, None, "none", [], "")
print(mallinfo2().h - before)
"""


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLES[0], "7")
    monkeypatch.delenv(VARIABLES[1], raising=False)
    bound_onednn_caches()
    assert os.environ[VARIABLES[0]] == "7"
    assert os.environ[VARIABLES[1]] == str(MOST_PRODUCTS)


def bytes_kept(**environ: str) -> int:
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**others, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.mkldnn.is_available(),
    reason="needs oneDNN and glibc",
)
def test_few_products_are_kept() -> None:
    unbounded = bytes_kept(**dict.fromkeys(VARIABLES, "1024"))
    assert bytes_kept() < unbounded / 3
