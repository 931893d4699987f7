"""The decoder of the Llama family and its kin: attention, feed-forward, one stage's run of layers.

Runs on one stage thread. What differs per step comes in as AttentionMetadata, never from a global;
knows nothing of sequences, scheduling or files.

Shapes: T tokens, W wanted ones, S sequences, D model dim, E all query heads, M all heads of the
fused projection, H head dim, B blocks, P position in block, K kv heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeserve.kernels.backend import Backend
from pipeserve.kernels.quant_reference import LinearInput, values_of
from pipeserve.models.config import ModelConfig
from pipeserve.models.linear import Embedding, GatedLinear, Linear, Logits, input_form
from pipeserve.models.rotary import rotary_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillMetadata:
    """Rows that compute a chunk of several tokens, in the order of their tokens."""

    block_table_SB: Tensor
    starts_S: Tensor
    """The step's token in which each chunk begins."""
    first_positions_S: Tensor
    num_tokens_S: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeMetadata:
    """Rows that compute one token each, which are the step's first tokens."""

    block_table_SB: Tensor
    lengths_S: Tensor
    """Cache positions that a row's token sees, itself included; 0: the token is not such a row's.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """Where a step's tokens stand and what they see."""

    positions_T: Tensor
    slots_T: Tensor
    """Cache slot that each token's key and value are written to."""
    decode: DecodeMetadata | None
    prefill: PrefillMetadata | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """One layer's keys and values: in the activations' type, or int8 codes with their scales."""

    k_BPKH: Tensor
    v_BPKH: Tensor
    k_scale_BKP: Tensor | None = None
    """float16, one per token and head; a key is code * scale. None without int8."""
    v_scale_BKP: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        tensors = (self.k_BPKH, self.v_BPKH, self.k_scale_BKP, self.v_scale_BKP)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """Weights of one layer. Query, key and value rows are one matrix, and so are gate and up."""

    attention_norm_D: Tensor
    qkv: Linear
    output: Linear
    ffn_norm_D: Tensor
    gate_up: GatedLinear
    down: Linear
    window: int | None = None
    """Cache positions that a token sees, itself included; None: all."""
    soft_cap: float | None = None
    """Bound of attention scores: cap * tanh(score / cap)."""
    sinks_N: Tensor | None = None
    """A logit per query head that takes part in the softmax and has no value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Final norm and output projection: the last stage's."""

    norm_D: Tensor
    output: Logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """One stage's share of a model: a run of layers, the embedding if first, the head if last."""

    config: ModelConfig
    backend: Backend
    embedding: Embedding | None
    layers: Sequence[DecoderLayer]
    head: Head | None
    rotary_frequencies: Tensor
    """[R / 2], radians per position."""

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """[T] -> [T, D]."""
        assert self.embedding is not None, "only the first stage has the embedding"
        return self.embedding(token_ids_T)

    def forward(
        self,
        x_TD: Tensor,
        caches: Sequence[LayerCache],
        metadata: AttentionMetadata,
        *,
        wanted_W: Tensor | None = None,
    ) -> Tensor:
        """Run the layers: [T, D] -> [T, D] float32; writes keys and values to the caches.

        wanted_W: which tokens' output is wanted, of a step with prefill -> [W, D]. The last layer
        ends at its attention for the others: nothing reads what it would make of them.
        """
        config, kernels, eps = self.config, self.backend, self.config.rms_eps
        angles = kernels.rotary_angles(
            metadata.positions_T, self.rotary_frequencies, rotary_scale(config.rope_scaling)
        )
        residual_TD = x_TD.float()
        normed_TD = kernels.rms_norm(residual_TD, self.layers[0].attention_norm_D, eps)
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            if index > 0:
                normed_TD, residual_TD = kernels.add_rms_norm(
                    x_TD, residual_TD, layer.attention_norm_D, eps, form=input_form(layer.qkv)
                )
            attended_TE = _attention(layer, config, kernels, normed_TD, angles, cache, metadata)
            if wanted_W is not None and layer is self.layers[-1]:
                if len(wanted_W) == 0:
                    return residual_TD[:0]
                attended_TE = values_of(attended_TE).index_select(0, wanted_W)
                residual_TD = residual_TD.index_select(0, wanted_W)
            x_TD = layer.output(attended_TE)
            normed_TD, residual_TD = kernels.add_rms_norm(
                x_TD, residual_TD, layer.ffn_norm_D, eps, form=input_form(layer.gate_up)
            )
            x_TD = layer.down(layer.gate_up(normed_TD, form=input_form(layer.down)))
        return x_TD + residual_TD

    def logits(self, x_SD: Tensor, *, out_SV: Tensor | None = None) -> Tensor:
        """Final norm and head: [S, D] -> [S, V] float32, written to out_SV if that is given."""
        assert self.head is not None, "only the last stage has the head"
        normed_SD = self.backend.rms_norm(x_SD, self.head.norm_D, self.config.rms_eps)
        return self.head.output(normed_SD, out_TO=out_SV)


def _attention(
    layer: DecoderLayer,
    config: ModelConfig,
    kernels: Backend,
    x_TD: LinearInput,
    angles: tuple[Tensor, Tensor],
    cache: LayerCache,
    metadata: AttentionMetadata,
) -> LinearInput:
    """[T, E], for the output projection."""
    qkv_TMH = layer.qkv(x_TD).unflatten(1, (-1, config.head_dim))
    q_TNH = kernels.rotary_and_cache(
        qkv_TMH,
        *angles,
        cache.k_BPKH,
        cache.v_BPKH,
        metadata.slots_T,
        k_scale_BKP=cache.k_scale_BKP,
        v_scale_BKP=cache.v_scale_BKP,
    )
    scale = config.head_dim**-0.5
    return paged_attention(layer, kernels, q_TNH, cache, metadata, scale=scale)


def paged_attention(
    layer: DecoderLayer,
    kernels: Backend,
    q_TNH: Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    *,
    scale: float,
) -> LinearInput:
    """Attention of decode rows and prefill chunks, each by its own kernel -> [T, E]."""
    decode, prefill = metadata.decode, metadata.prefill
    caches = (cache.k_BPKH, cache.v_BPKH)
    options: dict[str, Any] = {
        "k_scale_BKP": cache.k_scale_BKP,
        "v_scale_BKP": cache.v_scale_BKP,
        "window": layer.window,
        "soft_cap": layer.soft_cap,
        "sinks_N": layer.sinks_N,
    }
    decoded: LinearInput | None = None
    if decode is not None:
        q_SNH = q_TNH[: len(decode.lengths_S)]
        places = (decode.block_table_SB, decode.lengths_S)
        decoded = kernels.paged_attention_decode(q_SNH, *caches, *places, scale, **options)
    if prefill is None:
        assert decoded is not None, "a step has rows"
        return decoded
    out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    if decoded is not None:
        # All rows that there may be; those that are of a chunk are overwritten.
        out_TNH.flatten(1)[: len(values_of(decoded))] = values_of(decoded)
    return kernels.paged_attention_prefill(
        q_TNH,
        *caches,
        prefill.block_table_SB,
        prefill.first_positions_S,
        prefill.num_tokens_S,
        scale,
        starts_S=prefill.starts_S,
        out_TNH=out_TNH,
        **options,
    )
