"""A layer's attention options reach decode and prefill: window, soft cap, sinks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pipeserve.kernels.backend import backend_for
from pipeserve.models.layers import Decoder
from tests.models import tiny
from tests.models.test_int8_kv import logits
from tests.models.test_quantised import load

CPU = torch.device("cpu")
WINDOW = 11
TOKEN_IDS = [(17 * index) % 300 for index in range(40)]
CHUNKS = pytest.mark.parametrize("chunks", [(40,), (30, 9, 1)], ids=["prefill", "decode"])
"""Of the last token: which of the two kernels computes it."""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """One layer: what its tokens do not see has no other way to them."""
    model = tiny.random_llama(tiny.llama_config(num_hidden_layers=1))
    path = tiny.write_gguf(tmp_path_factory.mktemp("layers") / "tiny.gguf", model)
    return load(path, CPU, backend_for(CPU), keeps_quantised=False)


def last_logits(
    decoder: Decoder, chunks: tuple[int, ...], kv: torch.dtype = torch.float32, **options: object
) -> torch.Tensor:
    layer = dataclasses.replace(decoder.layers[0], **options)  # type: ignore[arg-type]
    changed = dataclasses.replace(decoder, layers=(layer,))
    return logits(changed, TOKEN_IDS[-sum(chunks) :], kv=kv, chunks=chunks)[-1]


@CHUNKS
@pytest.mark.parametrize("kv", [torch.float32, torch.int8], ids=str)
def test_a_window_hides_what_lies_before_it(
    kv: torch.dtype, chunks: tuple[int, ...], decoder: Decoder
) -> None:
    found = last_logits(decoder, chunks, kv, window=WINDOW)
    # Rotary angles are relative, so the window alone gives the same. Rotated by other angles,
    # keys fall on other codes.
    alone = last_logits(decoder, (WINDOW,), kv)
    whole = last_logits(decoder, chunks, kv)
    assert (found - alone).abs().max() < (found - whole).abs().max() / 10
    if kv == torch.float32:
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


@CHUNKS
def test_a_soft_cap_flattens_scores(chunks: tuple[int, ...], decoder: Decoder) -> None:
    plain = last_logits(decoder, chunks)
    torch.testing.assert_close(last_logits(decoder, chunks, soft_cap=1e5), plain)
    assert (last_logits(decoder, chunks, soft_cap=0.1) - plain).abs().max() > 0.1


@CHUNKS
def test_sinks_take_their_share(chunks: tuple[int, ...], decoder: Decoder) -> None:
    plain = last_logits(decoder, chunks)
    num_heads = decoder.config.num_heads
    none = last_logits(decoder, chunks, sinks_N=torch.full((num_heads,), -1e4))
    torch.testing.assert_close(none, plain)
    # Sinks that take everything leave the token itself, as if it attended to nothing.
    everything = last_logits(decoder, chunks, sinks_N=torch.full((num_heads,), 1e4))
    alone = last_logits(decoder, (1,), sinks_N=torch.full((num_heads,), 1e4))
    torch.testing.assert_close(everything, alone)
