"""Plain-torch twins of a decoder layer's kernels: the CPU path, and what Triton kernels agree with.

Runs on whichever stage thread calls. Plain tensors in and out; knows nothing of sequences, models
or options. The only state touched is what is passed in: the KV cache tensors.

Shapes: T tokens, S sequences, D model dim, F feed-forward dim, N query heads, K kv heads, H head
dim, M = N + 2K heads of a fused projection, R rotated part of H, B blocks (of the cache, or of a
row of the block table), P position in block, L = B * P cache positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pipeserve.kernels.paired_rows import GateUpOrder, unpair_columns


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    return functional.rms_norm(x_TD, weight_D.shape, weight_D, eps)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and x + residual itself."""
    sum_TD = x_TD + residual_TD
    return functional.rms_norm(sum_TD, weight_D.shape, weight_D, eps), sum_TD


def swiglu(gate_up_TF: Tensor, *, order: GateUpOrder = "halves") -> Tensor:
    """silu(gate) * up of [T, 2F] in this order (Shazeer 2020, arXiv 2002.05202)."""
    is_paired = order == "paired"
    gate_TF, up_TF = unpair_columns(gate_up_TF) if is_paired else gate_up_TF.chunk(2, dim=-1)
    return functional.silu(gate_TF).mul_(up_TF)


def decode_places(
    table_RB: Tensor, rows_S: Tensor, positions_S: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of decode rows at these positions: slots_S in the cache, lengths_S with the token itself, and
    their rows of the block table [S, B].

    A filler, whose position is -1, has slot -1 and length 0.
    """
    table_SB = table_RB.index_select(0, rows_S)
    seen_S = positions_S.clamp(min=0)
    blocks_S = table_SB.gather(1, (seen_S // block_size).unsqueeze(1)).squeeze(1)
    slots_S = blocks_S * block_size + seen_S % block_size
    return torch.where(positions_S < 0, -1, slots_S), positions_S + 1, table_SB


def rotary_angles(
    positions_T: Tensor, frequencies_R: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """cos_TR and sin_TR as `rotary` takes them: halves repeated, the first half of sin negated.

    frequencies_R: radians per position of each pair; scale multiplies cosines and sines.
    """
    angles_TR = torch.outer(positions_T.to(frequencies_R.dtype), frequencies_R.repeat(2))
    cos_TR, sin_TR = angles_TR.cos().mul_(scale), angles_TR.sin().mul_(scale)
    sin_TR[:, : frequencies_R.shape[0]].neg_()
    return cos_TR, sin_TR


def rotary(x_TMH: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the first R entries of every head by its token's angles (RoPE, arXiv 2104.09864).

    Entry i turns with entry i + R/2. Both halves of cos_TR are the same; the first half of
    sin_TR carries the minus sign, so that one roll and one fused multiply-add do it.
    """
    rotated_dim = cos_TR.shape[-1]
    head_dim = x_TMH.shape[-1]
    x_TMR = x_TMH if rotated_dim == head_dim else x_TMH[..., :rotated_dim]
    turned_TMR = torch.addcmul(
        x_TMR * cos_TR.unsqueeze(1), x_TMR.roll(rotated_dim // 2, -1), sin_TR.unsqueeze(1)
    )
    if rotated_dim == head_dim:
        return turned_TMR
    return torch.cat((turned_TMR, x_TMH[..., rotated_dim:]), dim=-1)


def rotary_and_cache(
    qkv_TMH: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_cache_BPKH: Tensor,
    v_cache_BPKH: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """Rotate queries and keys, write keys and values to their cache slots, return q_TNH.

    A slot is block id * P + position in block; a negative one is not written. qkv_TMH holds N
    query, K key, K value heads.
    """
    num_kv_heads, head_dim = k_cache_BPKH.shape[2:]
    num_qk_heads = qkv_TMH.shape[1] - num_kv_heads
    qk_TMH = rotary(qkv_TMH[:, :num_qk_heads], cos_TR, sin_TR)
    num_heads = num_qk_heads - num_kv_heads
    k_TKH, v_TKH = qk_TMH[:, num_heads:], qkv_TMH[:, num_qk_heads:]
    is_kept_T = slots_T >= 0
    if not is_kept_T.all():
        slots_T, k_TKH, v_TKH = slots_T[is_kept_T], k_TKH[is_kept_T], v_TKH[is_kept_T]
    k_cache_BPKH.view(-1, num_kv_heads, head_dim).index_copy_(0, slots_T, k_TKH)
    v_cache_BPKH.view(-1, num_kv_heads, head_dim).index_copy_(0, slots_T, v_TKH)
    return qk_TMH[:, :num_heads]


def paged_attention_decode(
    q_SNH: Tensor,
    k_cache_BPKH: Tensor,
    v_cache_BPKH: Tensor,
    block_table_SB: Tensor,
    lengths_S: Tensor,
    scale: float,
) -> Tensor:
    """Attention of one query per sequence over its first lengths_S cache positions -> [S, N, H].

    Entries of block_table_SB past a sequence's length may be any valid block id.
    """
    num_seqs, num_heads, head_dim = q_SNH.shape
    num_kv_heads = k_cache_BPKH.shape[2]
    length = block_table_SB.shape[1] * k_cache_BPKH.shape[1]
    blocks = block_table_SB.reshape(-1)
    shape = (num_seqs, length, num_kv_heads, head_dim)
    k_SKLH = k_cache_BPKH.index_select(0, blocks).view(shape).transpose(1, 2)
    v_SKLH = v_cache_BPKH.index_select(0, blocks).view(shape).transpose(1, 2)
    visible_SL = torch.arange(length, device=q_SNH.device) < lengths_S.unsqueeze(1)
    # The query heads that share a kv head stand in for query positions: no copy of K and V.
    out = functional.scaled_dot_product_attention(
        q_SNH.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim),
        k_SKLH,
        v_SKLH,
        attn_mask=visible_SL.view(num_seqs, 1, 1, length),
        scale=scale,
    )
    return out.reshape(num_seqs, num_heads, head_dim)


def paged_attention_prefill(
    q_TNH: Tensor,
    k_cache_BPKH: Tensor,
    v_cache_BPKH: Tensor,
    block_table_SB: Tensor,
    first_positions_S: Tensor,
    num_tokens_S: Tensor,
    scale: float,
    *,
    starts_S: Tensor | None = None,
    out_TNH: Tensor | None = None,
) -> Tensor:
    """Causal attention of chunks over everything cached before and in them -> [T, N, H].

    Sequence s brings num_tokens_S[s] queries, the first at position first_positions_S[s]; their
    own keys and values are in the cache already. starts_S: the token in which each one's queries
    begin; one after the other where it is left out. Tokens of no sequence stay unwritten.
    """
    if out_TNH is None:
        out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    if starts_S is None:
        starts_S = num_tokens_S.cumsum(0) - num_tokens_S
    chunks = zip(starts_S.tolist(), first_positions_S.tolist(), num_tokens_S.tolist(), strict=True)
    for seq, (start, first_position, num_tokens) in enumerate(chunks):
        end = start + num_tokens
        if num_tokens == 0:
            continue
        out_TNH[start:end] = _chunk_attention(
            q_TNH[start:end], k_cache_BPKH, v_cache_BPKH, block_table_SB[seq], first_position, scale
        )
    return out_TNH


def _chunk_attention(
    q_TNH: Tensor,
    k_cache_BPKH: Tensor,
    v_cache_BPKH: Tensor,
    block_table_B: Tensor,
    first_position: int,
    scale: float,
) -> Tensor:
    num_tokens, num_heads, head_dim = q_TNH.shape
    block_size, num_kv_heads = k_cache_BPKH.shape[1:3]
    group = num_heads // num_kv_heads
    length = first_position + num_tokens
    blocks = block_table_B[: -(-length // block_size)]
    k_LKH = k_cache_BPKH.index_select(0, blocks).view(-1, num_kv_heads, head_dim)[:length]
    v_LKH = v_cache_BPKH.index_select(0, blocks).view(-1, num_kv_heads, head_dim)[:length]
    positions = torch.arange(length, device=q_TNH.device)
    visible_TL = positions <= positions[first_position:].unsqueeze(1)
    expanded = (num_kv_heads, group, length, head_dim)
    out_KGTH = functional.scaled_dot_product_attention(
        q_TNH.view(num_tokens, num_kv_heads, group, head_dim).permute(1, 2, 0, 3),
        k_LKH.transpose(0, 1).unsqueeze(1).expand(expanded),
        v_LKH.transpose(0, 1).unsqueeze(1).expand(expanded),
        attn_mask=visible_TL.view(1, 1, num_tokens, length),
        scale=scale,
    )
    return out_KGTH.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)
