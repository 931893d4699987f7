"""What all tests share: the two real models, the gpu rule, sampling of wide cases, blockbuster.

torch is imported for gpu tests only; all others run its operators on one thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports torch: the machine's few cores are shared by stages and test processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent
EVENT_LOOP_TESTS = (TESTS / "server", TESTS / "engine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--wide-sample",
        type=int,
        metavar="N",
        help="of the tests marked wide, run at most N, evenly spread; the same ones each time",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    num_wanted = config.getoption("--wide-sample")
    if num_wanted is None:
        return
    if num_wanted < 1:
        raise pytest.UsageError(f"--wide-sample is {num_wanted}; it must be at least 1")
    wide = [item for item in items if item.get_closest_marker("wide")]
    every = max(1, -(-len(wide) // num_wanted))
    left_out = [item for index, item in enumerate(wide) if index % every]
    config.hook.pytest_deselected(items=left_out)
    left_out_ids = {id(item) for item in left_out}
    items[:] = [item for item in items if id(item) not in left_out_ids]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not item.get_closest_marker("gpu"):
        return
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.get("PIPESERVE_REQUIRE_CUDA") == "1":
        pytest.fail("PIPESERVE_REQUIRE_CUDA=1, but torch sees no CUDA device", pytrace=False)
    pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests of the event loop's side, a blocking call of ours on the loop is an error."""
    if not any(request.path.is_relative_to(folder) for folder in EVENT_LOOP_TESTS):
        yield
        return
    from blockbuster import blockbuster_ctx

    with blockbuster_ctx("pipeserve"):
        yield


def _cached_model(name: str) -> Path:
    from pipeserve.config import default_cache_dir
    from pipeserve.hub import resolve_model

    return resolve_model(name, cache_dir=default_cache_dir())


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """SmolLM2 135M Instruct, fetched once into the user's own cache."""
    return _cached_model("demo")


@pytest.fixture(scope="session")
def gemma_model_path() -> Path:
    """Gemma 3 270M, fetched once into the user's own cache."""
    return _cached_model("gemma3-270m")
