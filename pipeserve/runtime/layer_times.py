"""Measures what a layer of each kind, and the output head, take on one device.

Loads a few layers of the model file, computes steps with them as a stage does, and gives everything
back. Runs before the stages are loaded, on a thread of its own.

Shapes: T tokens, D model dim, S rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeserve.config import Config
from pipeserve.core.batch import MicroBatch, PipelineFacts
from pipeserve.errors import ConfigError
from pipeserve.gguf.reader import GGUFFile
from pipeserve.kernels.backend import Backend
from pipeserve.kernels.sampling_backend import sampling_backend_for
from pipeserve.models.config import ModelConfig
from pipeserve.models.layers import Decoder
from pipeserve.models.loader import LayerRange, WeightReader, device_bytes, form_of
from pipeserve.models.registry import find_family
from pipeserve.runtime import kv_cache
from pipeserve.runtime.cost_model import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    Curve,
    DeviceTimes,
    LayerTimes,
)
from pipeserve.runtime.devices import int_tensor
from pipeserve.runtime.loading import prepare_kernels, stage_backend
from pipeserve.runtime.stage_parts import StageParts, make_parts
from pipeserve.runtime.step_inputs import StepInputs, StepShape, exact_shape, pack
from pipeserve.runtime.timing import Call, capture, give_back, seconds_per_call
from pipeserve.runtime.token_pool import TokenPool
from pipeserve.runtime.transfer import HostTransfer

MEAN_LENGTH = PROMPT_TOKENS + OUTPUT_TOKENS // 2
"""Tokens in the cache of a decoding row of the expected mix."""

CACHE_BYTES = 64 * 1024**2
"""So much of a kind's weights is read in turn where there is as much: more than an H200's second
level cache holds (50 MB), as the weights of a whole stage are."""
MOST_LAYERS = {"cpu": 3, "cuda": 8}
"""Of one kind that are loaded; on a CPU, whose start-up is short, only some."""

KV_BYTES = 512 * 1024**2
"""Of the trial's KV cache in each layer; rows share blocks where they would need more."""

ROWS = {"cpu": (1, 8), "cuda": (1, 8, 32, 128)}
"""Decode rows that are measured, beside the largest number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingSizes:
    """Which steps are measured."""

    rows: tuple[int, ...]
    chunk_tokens: int
    """Of the prompts in a prefill step."""
    length: int
    """Of decoding rows."""


def timing_sizes(facts: PipelineFacts, device: torch.device) -> TimingSizes:
    """Those for a device."""
    fewer = (rows for rows in ROWS[device.type] if rows < facts.num_rows)
    return TimingSizes(
        rows=(*fewer, facts.num_rows),
        # Where rows are few, their prompts do not fill a step.
        chunk_tokens=min(
            facts.max_batch_tokens, facts.num_rows * min(PROMPT_TOKENS, facts.context_length)
        ),
        length=min(MEAN_LENGTH, facts.context_length),
    )


def layer_kinds(gguf_file: GGUFFile, num_layers: int, backend: Backend) -> tuple[str, ...]:
    """The kind of each layer: which tensors of which types it has, and how a device holds them."""
    kinds: list[list[str]] = [[] for _ in range(num_layers)]
    for name, info in sorted(gguf_file.tensors.items()):
        match name.split(".", 2):
            case ["blk", number, rest] if int(number) < num_layers:
                form = form_of(name, backend, num_layers)
                kinds[int(number)].append(f"{rest}:{info.type.name}:{form}")
    return tuple(" ".join(kind) for kind in kinds)


def measure_device(
    gguf_file: GGUFFile,
    model: ModelConfig,
    device: torch.device,
    *,
    config: Config,
    facts: PipelineFacts,
) -> DeviceTimes:
    """Takes about a second, on a GPU that has yet to compile its kernels up to a minute.

    facts: of the pipeline that is planned; num_blocks is not used.

    Raises:
        ModelError: a tensor cannot be read or dequantised, or leaves float16's range.
        ConfigError: the card cannot compute with these weights, or has no memory for the trial.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="timing") as executor:
        return executor.submit(_measure, gguf_file, model, device, config, facts).result()


def _measure(
    gguf_file: GGUFFile,
    model: ModelConfig,
    device: torch.device,
    config: Config,
    facts: PipelineFacts,
) -> DeviceTimes:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(config.threads_per_stage)
    try:
        # Triton launches on the current device, whatever the tensors' is.
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with on_device, torch.inference_mode():
            return _Trial(gguf_file, model, device, config, facts).measure()
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"{device} has not enough free memory to time a few layers of the model; end what else "
            "uses the card, lower max_num_batched_tokens or max_num_seqs, or list other devices"
        ) from None
    finally:
        torch.set_num_threads(num_threads)
        if device.type == "cuda":
            give_back()


class _Trial:
    """Layers of one model on one device, to be measured and thrown away."""

    def __init__(
        self,
        gguf_file: GGUFFile,
        model: ModelConfig,
        device: torch.device,
        config: Config,
        facts: PipelineFacts,
    ) -> None:
        self._file = gguf_file
        self._model = model
        self._device = device
        self._facts = facts
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sizes = timing_sizes(facts, device)
        self._backend = stage_backend(device, config)
        self._kv_dtype = kv_cache.storage_dtype(config.kv_cache_dtype, self._backend.dtype)

    def measure(self) -> DeviceTimes:
        kinds = layer_kinds(self._file, self._model.num_layers, self._backend)
        layers: dict[str, LayerTimes] = {}
        steps_s = []
        for kind in dict.fromkeys(kinds):
            layers[kind], step_s = self._measure_kind(
                [index for index, own in enumerate(kinds) if own == kind]
            )
            steps_s.append(step_s)
        decoder = self._load_last_layer()
        head, step_s = self._measure_head(decoder), min(steps_s)
        others_s = layers[kinds[-1]].prefill.at(self._sizes.chunk_tokens)
        return DeviceTimes(
            layers=layers,
            head=head,
            spared=self._measure_spared(decoder, others_s=others_s, step_s=step_s),
            step_s=step_s,
        )

    def _measure_kind(self, indices: Sequence[int]) -> tuple[LayerTimes, float]:
        """One layer of those, and what a step takes beside its layers."""
        decoder = self._load_layers(indices)
        many = self._make_parts(decoder)
        one = _first_layer(many)
        num_layers = len(decoder.layers)
        few_s = self._decode_s(one, self._sizes.rows[0])
        decode_s = [self._decode_s(many, rows) for rows in self._sizes.rows]
        # A step takes step_s + n * layer_s: two numbers of layers tell both. Noise must not make
        # either negative.
        step_s = (num_layers * few_s - decode_s[0]) / (num_layers - 1)
        step_s = min(max(0.0, step_s), 0.5 * min(few_s, *decode_s))
        prefill_s = max(0.5 * few_s, self._prefill_s(one) - step_s)
        times = LayerTimes(
            decode=Curve(
                sizes=self._sizes.rows,
                seconds=tuple((each_s - step_s) / num_layers for each_s in decode_s),
            ),
            prefill=Curve(sizes=(self._sizes.chunk_tokens,), seconds=(prefill_s,)),
        )
        return times, step_s

    def _load_layers(self, indices: Sequence[int]) -> Decoder:
        """Two or more of a kind as one decoder without embedding and head."""
        weights, family = self._weights(), find_family(self._file)
        prefix = f"blk.{indices[0]}."
        layer_bytes = sum(
            device_bytes(info, self._backend, self._model.num_layers)
            for name, info in self._file.tensors.items()
            if name.startswith(prefix)
        )
        num_wanted = min(MOST_LAYERS[self._device.type], max(2, -(-CACHE_BYTES // layer_bytes)))
        # From the end: the first layer of a model would bring the embedding.
        chosen = indices[::-1][:num_wanted]
        end = self._model.num_layers + 1  # of a model in which none of these is the last layer
        decoders = [
            family.load(
                self._model, LayerRange(first=index, end=index + 1, num_layers=end), weights
            )
            for index in chosen
        ]
        layers = [decoder.layers[0] for decoder in decoders]
        layers = layers if len(layers) > 1 else layers * 2
        decoder = replace(decoders[0], embedding=None, layers=layers)
        prepare_kernels(decoder)
        return decoder

    def _load_last_layer(self) -> Decoder:
        """With the head."""
        end = self._model.num_layers
        last = LayerRange(first=end - 1, end=end, num_layers=end)
        decoder = find_family(self._file).load(self._model, last, self._weights())
        prepare_kernels(decoder)
        return decoder

    def _measure_spared(self, decoder: Decoder, *, others_s: float, step_s: float) -> Curve:
        """Of the last layer, where others of its kind take others_s for a prefill step."""
        parts = self._make_parts(replace(decoder, embedding=None))
        x_SD = self._hidden(self._shape(parts, self._prefill_batch()).num_samples)
        logits = capture(lambda: decoder.logits(x_SD), self._stream)
        last_s = self._prefill_s(parts) - step_s - seconds_per_call(logits, self._device)
        # Noise must not make a layer faster than nothing.
        spared_s = min(max(0.0, others_s - last_s), others_s)
        return Curve(sizes=(self._sizes.chunk_tokens,), seconds=(spared_s,))

    def _measure_head(self, decoder: Decoder) -> Curve:
        """Final norm, head and a draw at temperature 1."""
        device = self._device
        sampling = sampling_backend_for(device)

        def sampled_s(num_rows: int) -> float:
            x_SD = self._hidden(num_rows)
            ones_S, zeros_S = (
                torch.full((num_rows,), value, device=device) for value in (1.0, 0.0)
            )
            uniform_S = torch.full((num_rows,), 0.5, dtype=torch.float64, device=device)

            def call() -> object:
                return sampling.sample(decoder.logits(x_SD), ones_S, zeros_S, uniform_S)

            return seconds_per_call(capture(call, self._stream), device)

        return Curve(
            sizes=self._sizes.rows, seconds=tuple(sampled_s(rows) for rows in self._sizes.rows)
        )

    def _weights(self) -> WeightReader:
        return WeightReader(
            self._file, device=self._device, backend=self._backend, on_read=lambda name: None
        )

    def _hidden(self, num_tokens: int) -> torch.Tensor:
        """Random, not zeros: a card that multiplies zeros takes less power and clocks higher."""
        size = (num_tokens, self._model.hidden_size)
        return torch.randn(size, dtype=torch.float32, device=self._device)

    def _make_parts(self, decoder: Decoder) -> StageParts:
        """A stage whose rows hold KV blocks of their own, as far as KV_BYTES go."""
        facts = self._facts
        token_pool = TokenPool(
            num_rows=facts.num_rows, device=self._device, transfer=HostTransfer()
        )
        parts = make_parts(
            decoder, self._device, facts=facts, kv_dtype=self._kv_dtype, token_pool=token_pool
        )
        block_bytes = kv_cache.block_bytes(self._model, facts.block_size, self._kv_dtype)
        blocks_per_row = -(-max(self._sizes.length, self._chunk_length) // facts.block_size)
        num_wanted = facts.num_rows * blocks_per_row
        num_blocks = max(1, min(num_wanted, KV_BYTES // block_bytes))
        parts = parts.with_caches(num_blocks=num_blocks)
        blocks = np.arange(num_wanted, dtype=np.int32)
        parts.computation.block_table.apply(
            replace(
                _decode_batch(1, 1),
                block_rows=blocks // blocks_per_row,
                block_columns=blocks % blocks_per_row,
                block_ids=blocks % num_blocks,
            )
        )
        return parts

    @property
    def _chunk_length(self) -> int:
        """Of one prompt in a prefill step."""
        return min(PROMPT_TOKENS, self._sizes.chunk_tokens, self._facts.context_length)

    def _decode_s(self, parts: StageParts, num_rows: int) -> float:
        call = self._step(parts, _decode_batch(num_rows, self._sizes.length))
        return seconds_per_call(capture(call, self._stream), self._device)

    def _prefill_s(self, parts: StageParts) -> float:
        call = self._step(parts, self._prefill_batch())
        return seconds_per_call(capture(call, self._stream), self._device)

    def _prefill_batch(self) -> MicroBatch:
        return _prefill_batch(self._sizes.chunk_tokens, self._chunk_length, self._facts.num_rows)

    def _step(self, parts: StageParts, batch: MicroBatch) -> Call:
        shape = self._shape(parts, batch)
        most_positions = int((batch.first_positions_S + batch.num_tokens_S).max())
        max_length = None if self._device.type == "cuda" else most_positions
        inputs = StepInputs.of(int_tensor(pack(batch, shape), self._device), shape)
        hidden_TD = self._hidden(shape.num_tokens)
        return lambda: parts.computation(inputs, hidden_TD, max_length=max_length)

    def _shape(self, parts: StageParts, batch: MicroBatch) -> StepShape:
        """Steps with prefill are padded as a stage pads them."""
        shapes = parts.shapes if batch.num_decode_rows == 0 else None
        if shapes is None:
            return exact_shape(batch)
        return shapes.find_captured(batch) or shapes.find(batch)


def _first_layer(parts: StageParts) -> StageParts:
    """A stage of that layer alone, with the same memory."""
    computation = parts.computation
    return replace(
        parts,
        computation=replace(
            computation,
            decoder=replace(computation.decoder, layers=computation.decoder.layers[:1]),
            caches=computation.caches[:1],
        ),
    )


def _decode_batch(num_rows: int, length: int) -> MicroBatch:
    """The first rows decode, each the last of its `length` tokens."""
    rows_S = np.arange(num_rows, dtype=np.int32)
    return _batch(num_rows, rows_S, np.full_like(rows_S, length - 1), np.ones_like(rows_S))


def _prefill_batch(num_tokens: int, chunk_length: int, num_rows: int) -> MicroBatch:
    """Prompts of chunk_length from their beginning, until there are num_tokens."""
    lengths = [
        min(chunk_length, num_tokens - first) for first in range(0, num_tokens, chunk_length)
    ][:num_rows]
    num_tokens_S = np.array(lengths, dtype=np.int32)
    rows_S = np.arange(len(lengths), dtype=np.int32)
    return _batch(0, rows_S, np.zeros_like(rows_S), num_tokens_S)


def _batch(
    num_decode_rows: int,
    rows_S: np.ndarray,
    first_positions_S: np.ndarray,
    num_tokens_S: np.ndarray,
) -> MicroBatch:
    none = np.zeros(0, dtype=np.int32)
    return MicroBatch(
        step_id=0,
        num_decode_rows=num_decode_rows,
        rows_S=rows_S,
        first_positions_S=first_positions_S,
        num_tokens_S=num_tokens_S,
        samples_S=np.ones(len(rows_S), dtype=np.bool_),
        prefill_token_ids=np.zeros(
            0 if num_decode_rows else int(num_tokens_S.sum()), dtype=np.int32
        ),
        starts=(),
        block_rows=none,
        block_columns=none,
        block_ids=none,
        needs_step=None,
    )
