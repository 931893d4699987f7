"""Which devices get a process of their own, decided without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeserve.config import Config
from pipeserve.engine_host import takes_two_processes

HERE, NOWHERE = (Path(__file__),), (Path("/nowhere/nvidiactl"),)


@pytest.mark.parametrize(
    ("options", "gpu_nodes", "environ", "expected"),
    [
        ({"devices": ("cpu", "cpu")}, HERE, {}, False),
        ({"devices": ("cpu", "cuda:0")}, NOWHERE, {}, True),
        ({"devices": ("auto",)}, HERE, {}, True),
        ({"devices": ("auto",)}, HERE, {"CUDA_VISIBLE_DEVICES": "1"}, True),
        ({"devices": ("auto",)}, HERE, {"CUDA_VISIBLE_DEVICES": ""}, False),
        ({"devices": ("auto",)}, NOWHERE, {}, False),
        ({"devices": ("cpu",), "processes": "two"}, NOWHERE, {}, True),
        ({"devices": ("cuda:0",), "processes": "one"}, HERE, {}, False),
    ],
)
def test_auto_takes_two_where_a_stage_is_on_a_gpu(
    options: dict[str, Any], gpu_nodes: tuple[Path], environ: dict[str, str], expected: bool
) -> None:
    config = Config(**options)
    assert takes_two_processes(config, gpu_nodes=gpu_nodes, environ=environ) is expected
