"""A layer's attention as every backend offers it: signatures, and the choice between plain twins.

Runs on whichever stage thread calls. Plain tensors in and out, as in reference.py.

Shapes: as in reference_attention.py.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pipeserve.kernels import reference, reference_attention
from pipeserve.kernels.quant_reference import LinearInput


class RotaryAndCache(Protocol):
    """reference.rotary_and_cache; with scales [B, K, P], rotary_and_cache_int8."""

    def __call__(
        self,
        qkv_TMH: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        k_cache_BPKH: Tensor,
        v_cache_BPKH: Tensor,
        slots_T: Tensor,
        /,
        *,
        k_scale_BKP: Tensor | None = None,
        v_scale_BKP: Tensor | None = None,
    ) -> Tensor: ...


class PagedAttentionDecode(Protocol):
    """reference.paged_attention_decode, with the options of reference_attention; the heads of a
    row side by side, as the output projection takes them: [S, N * H]."""

    def __call__(
        self,
        q_SNH: Tensor,
        k_cache_BPKH: Tensor,
        v_cache_BPKH: Tensor,
        block_table_SB: Tensor,
        lengths_S: Tensor,
        scale: float,
        /,
        *,
        k_scale_BKP: Tensor | None = None,
        v_scale_BKP: Tensor | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks_N: Tensor | None = None,
    ) -> LinearInput: ...


class PagedAttentionPrefill(Protocol):
    """reference.paged_attention_prefill, likewise: [T, N * H], a view of out_TNH if given."""

    def __call__(
        self,
        q_TNH: Tensor,
        k_cache_BPKH: Tensor,
        v_cache_BPKH: Tensor,
        block_table_SB: Tensor,
        first_positions_S: Tensor,
        num_tokens_S: Tensor,
        scale: float,
        /,
        *,
        starts_S: Tensor | None = None,
        out_TNH: Tensor | None = None,
        k_scale_BKP: Tensor | None = None,
        v_scale_BKP: Tensor | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks_N: Tensor | None = None,
    ) -> Tensor: ...


def rotary_and_cache(
    qkv_TMH: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_cache_BPKH: Tensor,
    v_cache_BPKH: Tensor,
    slots_T: Tensor,
    *,
    k_scale_BKP: Tensor | None = None,
    v_scale_BKP: Tensor | None = None,
) -> Tensor:
    """The plain twin for the caches given."""
    plain = (qkv_TMH, cos_TR, sin_TR, k_cache_BPKH, v_cache_BPKH)
    if k_scale_BKP is None or v_scale_BKP is None:
        return reference.rotary_and_cache(*plain, slots_T)
    return reference_attention.rotary_and_cache_int8(*plain, k_scale_BKP, v_scale_BKP, slots_T)


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
    """The plain twin for the options given."""
    plain = (q_SNH, k_cache_BPKH, v_cache_BPKH, block_table_SB, lengths_S, scale)
    if _are_unset(k_scale_BKP, v_scale_BKP, window, soft_cap, sinks_N):
        return reference.paged_attention_decode(*plain).flatten(1)
    out_SNH = reference_attention.paged_attention_decode(
        *plain,
        k_scale_BKP=k_scale_BKP,
        v_scale_BKP=v_scale_BKP,
        window=window,
        soft_cap=soft_cap,
        sinks_N=sinks_N,
    )
    return out_SNH.flatten(1)


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
    k_scale_BKP: Tensor | None = None,
    v_scale_BKP: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """The plain twin for the options given."""
    caches = (k_cache_BPKH, v_cache_BPKH, block_table_SB)
    plain = (q_TNH, *caches, first_positions_S, num_tokens_S, scale)
    if _are_unset(k_scale_BKP, v_scale_BKP, window, soft_cap, sinks_N):
        return reference.paged_attention_prefill(
            *plain, starts_S=starts_S, out_TNH=out_TNH
        ).flatten(1)
    out_TNH = reference_attention.paged_attention_prefill(
        *plain,
        starts_S=starts_S,
        out_TNH=out_TNH,
        k_scale_BKP=k_scale_BKP,
        v_scale_BKP=v_scale_BKP,
        window=window,
        soft_cap=soft_cap,
        sinks_N=sinks_N,
    )
    return out_TNH.flatten(1)


def _are_unset(*options: Tensor | float | None) -> bool:
    return all(option is None for option in options)
