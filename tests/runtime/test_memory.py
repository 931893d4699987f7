"""The step that a GPU's memory is measured by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeserve.kernels.backend import backend_for
from pipeserve.runtime.late_thread import LateAtOnce
from pipeserve.runtime.memory import dearest_step
from pipeserve.runtime.sampled import Sampled
from pipeserve.runtime.stage_parts import make_parts
from pipeserve.runtime.token_pool import TokenPool
from pipeserve.runtime.transfer import HostTransfer
from tests.fakes import facts
from tests.models import tiny
from tests.models.test_quantised import load


@pytest.mark.parametrize(
    ("num_chunks", "num_tokens"), [(1, 48), (3, 100), (4, 100), (5, 100), (2, 96)]
)
def test_the_dearest_step_is_as_large_as_its_rows_allow(num_chunks: int, num_tokens: int) -> None:
    limits = facts(num_rows=5, num_blocks=64, context_length=48, max_batch_tokens=100)
    step = dearest_step(limits, num_chunks=num_chunks)
    assert step.num_tokens == len(step.prefill_token_ids) == num_tokens
    assert step.num_rows == num_chunks == len(step.starts)
    assert max(step.num_tokens_S) <= 48
    assert max(step.num_tokens_S) - min(step.num_tokens_S) <= 1


@pytest.mark.parametrize(("chained_every", "num_chained"), [(1, 5), (2, 3)])
def test_rows_with_and_without_a_chain_are_met(chained_every: int, num_chained: int) -> None:
    limits = facts(num_rows=5, num_blocks=64, context_length=48, samples_late=True)
    step = dearest_step(limits, num_chunks=5, chained_every=chained_every)
    chained = [start.row for start in step.starts if start.sampling.chain is not None]
    assert len(chained) == num_chained
    assert step.late_seqs_L is not None and step.late_seqs_L.tolist() == chained
    assert any(step.starts[row].sampling.has_penalties for row in chained)
    assert not all(step.starts[row].sampling.has_penalties for row in chained)
    (only,) = dearest_step(limits, num_chunks=1).starts
    assert only.sampling.chain is not None


def test_a_scored_step_computes_and_scores_every_prompt(tmp_path: Path) -> None:
    """As the probe runs it on a card; else the last layer would be measured for few tokens."""
    cpu = torch.device("cpu")
    path = tiny.write_gguf(tmp_path / "tiny.gguf", tiny.random_llama(tiny.llama_config()))
    decoder = load(path, cpu, backend_for(cpu), keeps_quantised=False)
    limits = facts(
        num_rows=3,
        num_blocks=64,
        context_length=32,
        max_batch_tokens=30,
        samples_late=True,
        vocab_size=decoder.config.vocab_size,
    )
    pool = TokenPool(num_rows=3, device=cpu, transfer=HostTransfer())
    parts = make_parts(decoder, cpu, facts=limits, kv_dtype=torch.float32, token_pool=pool)
    runner = parts.as_probe().make_runner(None, LateAtOnce(stage=0, device=cpu, num_threads=1))
    step = dearest_step(limits, num_chunks=3, is_scored=True)
    with torch.inference_mode():
        sampled = runner.run(step, None)
    assert isinstance(sampled, Sampled)
    assert [len(each.token_P) for each in sampled.prompt_logprobs()] == [9, 9, 9]
