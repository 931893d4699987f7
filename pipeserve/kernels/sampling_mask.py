"""Bans what a grammar does not allow, on the device. Twin: reference_sampling.apply_masks.

Shapes: S rows of a step, V vocabulary, M masked rows, W words of 32 bits.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeserve.kernels.aot import AotCase

_CHUNK = 2048


@triton.jit
def masks_kernel(
    logits_ptr, seqs_ptr, words_ptr, vocab_size, row_stride, num_words, CHUNK: tl.constexpr
):
    mask = tl.program_id(0).to(tl.int64)
    row = tl.load(seqs_ptr + mask).to(tl.int64)
    ids_X = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    is_word_X = ids_X // 32 < num_words
    words_X = tl.load(words_ptr + mask * num_words + ids_X // 32, is_word_X, other=0)
    is_banned_X = ((words_X >> (ids_X % 32)) & 1) == 0
    banned_X = tl.full((CHUNK,), float("-inf"), tl.float32)
    tl.store(logits_ptr + row * row_stride + ids_X, banned_X, is_banned_X & (ids_X < vocab_size))


def apply_masks(logits_SV: Tensor, seqs_M: Tensor, words_MW: Tensor) -> None:
    """Ban, in place, the tokens whose bits are not set in the masks of the rows seqs_M.

    Both int32; a row stands in seqs_M at most once. Bit i % 32 of word i // 32 is token i; tokens
    beyond the last word are banned.
    """
    assert logits_SV.dtype == torch.float32 and logits_SV.stride(1) == 1, "float32 rows"
    assert words_MW.dtype == seqs_M.dtype == torch.int32 and words_MW.is_contiguous(), "int32"
    num_masks, num_words = words_MW.shape
    if num_masks == 0:
        return
    vocab_size = logits_SV.shape[1]
    masks_kernel[(num_masks, triton.cdiv(vocab_size, _CHUNK))](
        logits_SV, seqs_M, words_MW, vocab_size, logits_SV.stride(0), num_words, CHUNK=_CHUNK
    )


AOT_CASES = (
    AotCase(
        name="masks",
        kernel=masks_kernel,
        signature={
            "logits_ptr": "*fp32",
            "seqs_ptr": "*i32",
            "words_ptr": "*i32",
            **dict.fromkeys(("vocab_size", "row_stride", "num_words"), "i32"),
        },
        constexprs={"CHUNK": _CHUNK},
    ),
)
