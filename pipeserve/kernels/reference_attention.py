"""Plain-torch twins for what reference.py lacks: int8 KV, sliding window, soft-cap, sinks.

Runs on whichever stage thread calls; written to be read, in float32 and one sequence at a time.

Shapes: T tokens, S sequences, N query heads, K kv heads, G query heads of a kv head, H head dim,
M = N + 2K heads of a fused projection, R rotated part of H, B blocks, P position in block, L cache
positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeserve.kernels.reference import rotary

_LEAST_SCALE = 2.0**-24
"""The least positive float16: a head of zeros still gets a scale that can be divided by."""


def quantise_kv(x_TKH: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [T, K, H] and their float16 scales [T, K]: x is about code * scale.

    Codes come from the rounded scale, so that nothing but the code's own rounding is lost.
    """
    x_TKH = x_TKH.float()
    scale_TK = (x_TKH.abs().amax(-1) * (1.0 / 127.0)).clamp(min=_LEAST_SCALE).half()
    codes_TKH = (x_TKH / scale_TK.float().unsqueeze(-1)).round().clamp(-127, 127)
    return codes_TKH.to(torch.int8), scale_TK


def rotary_and_cache_int8(
    qkv_TMH: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_cache_BPKH: Tensor,
    v_cache_BPKH: Tensor,
    k_scale_BKP: Tensor,
    v_scale_BKP: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """reference.rotary_and_cache for int8 caches; a negative slot is not written."""
    page, num_kv_heads, head_dim = k_cache_BPKH.shape[1:]
    num_qk_heads = qkv_TMH.shape[1] - num_kv_heads
    num_heads = num_qk_heads - num_kv_heads
    qk_TMH = rotary(qkv_TMH[:, :num_qk_heads].float(), cos_TR, sin_TR)
    is_kept_T = slots_T >= 0
    slots = slots_T[is_kept_T]
    for x_TKH, cache, scales in (
        (qk_TMH[:, num_heads:], k_cache_BPKH, k_scale_BKP),
        (qkv_TMH[:, num_qk_heads:], v_cache_BPKH, v_scale_BKP),
    ):
        codes_TKH, scale_TK = quantise_kv(x_TKH[is_kept_T])
        cache.view(-1, num_kv_heads, head_dim)[slots] = codes_TKH
        scales[slots // page, :, slots % page] = scale_TK
    return qk_TMH[:, :num_heads].to(qkv_TMH.dtype)


def paged_attention_decode(
    q_SNH: Tensor,
    k_cache_BPKH: Tensor,
    v_cache_BPKH: Tensor,
    block_table_SB: Tensor,
    lengths_S: Tensor,
    scale: float,
    *,
    k_scale_BKP: Tensor | None = None,
    v_scale_BKP: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """One query per sequence: a chunk of one token at the sequence's last position."""
    return paged_attention_prefill(
        q_SNH,
        k_cache_BPKH,
        v_cache_BPKH,
        block_table_SB,
        lengths_S - 1,
        (lengths_S > 0).int(),
        scale,
        k_scale_BKP=k_scale_BKP,
        v_scale_BKP=v_scale_BKP,
        window=window,
        soft_cap=soft_cap,
        sinks_N=sinks_N,
        starts_S=torch.arange(len(lengths_S)),
    )


def paged_attention_prefill(
    q_TNH: Tensor,
    k_cache_BPKH: Tensor,
    v_cache_BPKH: Tensor,
    block_table_SB: Tensor,
    first_positions_S: Tensor,
    num_tokens_S: Tensor,
    scale: float,
    *,
    k_scale_BKP: Tensor | None = None,
    v_scale_BKP: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: Tensor | None = None,
    starts_S: Tensor | None = None,
    out_TNH: Tensor | None = None,
) -> Tensor:
    """Causal attention of chunks over everything cached before and in them -> [T, N, H].

    `window`: a query at position i sees positions above i - window. `soft_cap` bends scores to
    cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118, section 2). sinks_N: a logit per head that
    takes part in the softmax and has no value (gpt-oss). starts_S: the token in which each
    sequence's queries begin; one after the other where it is left out. Tokens of no sequence stay
    as out_TNH has them, or 0.
    """
    if starts_S is None:
        starts_S = num_tokens_S.cumsum(0) - num_tokens_S
    if out_TNH is None:
        out_TNH = torch.zeros_like(q_TNH, memory_format=torch.contiguous_format)
    for seq, num_tokens in enumerate(num_tokens_S.tolist()):
        if num_tokens == 0:
            continue
        first, start = int(first_positions_S[seq]), int(starts_S[seq])
        length = first + num_tokens
        k_LKH = _gather(k_cache_BPKH, k_scale_BKP, block_table_SB[seq], length)
        v_LKH = _gather(v_cache_BPKH, v_scale_BKP, block_table_SB[seq], length)
        num_kv_heads, head_dim = k_LKH.shape[1:]
        q_TKGH = (
            q_TNH[start : start + num_tokens].float().view(num_tokens, num_kv_heads, -1, head_dim)
        )
        scores_KGTL = torch.einsum("tkgh,lkh->kgtl", q_TKGH, k_LKH) * scale
        if soft_cap is not None:
            scores_KGTL = soft_cap * torch.tanh(scores_KGTL / soft_cap)
        position_T1 = torch.arange(first, length, device=q_TNH.device).unsqueeze(1)
        position_L = torch.arange(length, device=q_TNH.device)
        is_hidden_TL = position_L > position_T1
        if window is not None:
            is_hidden_TL |= position_L <= position_T1 - window
        scores_KGTL = scores_KGTL.masked_fill(is_hidden_TL, float("-inf"))
        probs_KGTL = _softmax(scores_KGTL, sinks_N)
        out_TKGH = torch.einsum("kgtl,lkh->tkgh", probs_KGTL, v_LKH)
        out_TNH[start : start + num_tokens] = out_TKGH.reshape(num_tokens, -1, head_dim).to(
            out_TNH.dtype
        )
    return out_TNH


def _softmax(scores_KGTL: Tensor, sinks_N: Tensor | None) -> Tensor:
    if sinks_N is None:
        return scores_KGTL.softmax(-1)
    num_kv_heads, group, num_tokens, length = scores_KGTL.shape
    sinks_KGT1 = sinks_N.float().view(num_kv_heads, group, 1, 1).expand(-1, -1, num_tokens, 1)
    return torch.cat((scores_KGTL, sinks_KGT1), -1).softmax(-1)[..., :length]


def _gather(
    cache_BPKH: Tensor, scale_BKP: Tensor | None, block_table_B: Tensor, length: int
) -> Tensor:
    """The first `length` positions of a sequence, [L, K, H] float32."""
    page, num_kv_heads, head_dim = cache_BPKH.shape[1:]
    blocks = block_table_B[: -(-length // page)].long()
    x_BPKH = cache_BPKH[blocks].float()
    if scale_BKP is not None:
        x_BPKH = x_BPKH * scale_BKP[blocks].float().transpose(1, 2).unsqueeze(-1)
    return x_BPKH.reshape(-1, num_kv_heads, head_dim)[:length]
