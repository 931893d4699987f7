"""10,000 tokens of the demo model on a GPU under a random load, against float32 and against alone.

In every mode, through every captured number of decode rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeserve.runtime.gpu_shapes import decode_sizes
from tests.models.decided import F16, FP8, INT8, INT8_TAIL, Precision
from tests.models.requantised import read_model, reference_model
from tests.runtime.load_agreement import assert_same_alone, compare
from tests.runtime.random_load import GREEDY, Load, Phase, StepSize, loaded_engine

logger = logging.getLogger(__name__)

NUM_ROWS = 24
NUM_BLOCKS = 160
"""Of 16 tokens: too few for the 24 sequences that grow together in the last phase."""
NUM_ALONE = 20
LOAD = Load(
    phases=[
        Phase(num_live=2, max_prompt=300),
        Phase(num_live=4, max_prompt=300),
        Phase(num_live=8, max_prompt=200),
        Phase(num_live=16, max_prompt=60),
        Phase(num_live=32, max_prompt=40),
        Phase(num_live=20, max_prompt=300),
        Phase(num_live=1, max_prompt=300),
        Phase(num_live=32, max_prompt=8, least_output=130),
    ],
    events_per_phase=150,
    num_tokens=10_000,
    max_output=150,
)


def kv_bytes(bytes_per_head: int) -> int:
    """Of NUM_BLOCKS: 16 tokens, keys and values, 3 heads, 30 layers."""
    return NUM_BLOCKS * 16 * 2 * 3 * 30 * bytes_per_head


@dataclass(frozen=True, kw_only=True)
class Mode:
    """Options, and what they may cost."""

    options: dict[str, str] = field(default_factory=dict)
    precision: Precision
    bytes_per_head: int = 128
    """A key or value of 64 entries."""


MODES = {
    "auto": Mode(precision=INT8_TAIL),
    "f16 activations": Mode(options={"activations": "f16"}, precision=F16),
    "int8 activations": Mode(options={"activations": "int8"}, precision=INT8_TAIL),
    "both weights": Mode(options={"weights": "both"}, precision=INT8_TAIL),
    "bf16 weights": Mode(options={"weights": "bf16"}, precision=INT8),
    "fp8 weights": Mode(options={"weights": "fp8"}, precision=FP8),
    "int8 KV": Mode(options={"kv_cache_dtype": "int8"}, precision=INT8_TAIL, bytes_per_head=66),
}


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_tokens_under_load_are_those_of_float32(mode: Mode, demo_model_path: Path) -> None:
    sizes = check_load(
        demo_model_path,
        ("cuda:0",),
        LOAD,
        mode.precision,
        max_num_seqs=NUM_ROWS,
        max_num_batched_tokens=512,
        kv_cache_bytes=kv_bytes(mode.bytes_per_head),
        **mode.options,
    )
    replayed = {size.num_decode_rows for size in sizes if size.num_prefill_tokens == 0}
    bounds = decode_sizes(NUM_ROWS)
    for fewer, most in zip((0, *bounds), bounds, strict=False):
        assert any(fewer < rows <= most for rows in replayed), f"no step of {most} rows"


def check_load(
    path: Path, devices: Sequence[str], load: Load, precision: Precision, **options: object
) -> set[StepSize]:
    """Run and compare; the sizes of the steps that it took."""
    with loaded_engine(path, devices, record_every=8, **options) as loaded:
        served = loaded.run(load)
        reference = reference_model(read_model(path), torch.device(devices[0]))
        verdicts = compare(served, reference, precision)
        complete = [verdict for verdict in verdicts if not verdict.served.is_aborted]
        assert_same_alone(loaded, complete[:: max(1, len(complete) // NUM_ALONE)])
        stats = loaded.stats()
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hits > 0
    assert any(verdict.served.is_aborted for verdict in verdicts)
    assert sum(len(verdict.served.token_ids) for verdict in verdicts) >= load.num_tokens
    divergences = [kl for verdict in verdicts for kl in verdict.kl]
    greedy = [v.decided for v in verdicts if v.served.sampling.temperature == GREEDY.temperature]
    drawn = [v.decided for v in verdicts if v.served.sampling.temperature > 0.0]
    shares = [float(np.concatenate(decided).mean()) for decided in (greedy, drawn)]
    logger.info("%s: mean KL %.2e of %d tokens", options, np.mean(divergences), len(divergences))
    logger.info(
        "decided: %.0f %% of greedy, %.0f %% of drawn; %s", *np.multiply(shares, 100), stats
    )
    assert np.mean(divergences) <= precision.mean_kl
    assert shares[0] > 0.1
    assert shares[1] > 0.01
    return loaded.watched.sizes
