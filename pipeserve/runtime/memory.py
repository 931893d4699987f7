"""How much of a card's memory is left for the KV cache: measured, once the weights are there.

A probe of each stage computes its dearest step and captures its largest graphs with a KV cache of a
few blocks; what the card is short of meanwhile is what serving will take. Runs at load, before
the stages' threads.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np
import torch

from pipeserve.core.batch import MicroBatch, PipelineFacts, RowStart
from pipeserve.core.sampler_chain import WHOLE_SEQUENCE, Dry, SamplerChain
from pipeserve.core.sampling import MAX_LOGPROBS, SamplingParams
from pipeserve.errors import ConfigError
from pipeserve.runtime.cuda_graphs import StepGraphs
from pipeserve.runtime.devices import gib
from pipeserve.runtime.late_thread import LateAtOnce
from pipeserve.runtime.stage_parts import StageParts

MARGIN = 0.02
"""Share of a card's memory that stays free: for the driver, and for what fragments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of one stage on its card beside weights and KV cache."""

    workspace_bytes: int
    """Of the dearest step, and of the state of penalties."""
    graph_bytes: int
    """Of all captured graphs."""

    @property
    def total_bytes(self) -> int:
        return self.workspace_bytes + self.graph_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CardMemory:
    """How one card's memory is shared out."""

    device: torch.device
    total_bytes: int
    free_bytes: int
    """Once the weights are there."""
    kept_bytes: int
    """For its stages' steps and graphs."""
    limit_bytes: int | None
    """What memory_limit_bytes leaves of free_bytes to its stages."""

    @property
    def margin_bytes(self) -> int:
        return int(MARGIN * self.total_bytes)

    @property
    def room_bytes(self) -> int:
        """For KV caches."""
        most = self.free_bytes - self.margin_bytes
        return (most if self.limit_bytes is None else min(most, self.limit_bytes)) - self.kept_bytes


def measure_cards(
    stages: Sequence[StageParts], facts: PipelineFacts, rooms: Sequence[int | None]
) -> list[CardMemory]:
    """One per GPU that has a stage, in the order of the stages; takes some seconds each.

    rooms: what each stage may take beside its weights; None: without a limit.
    """
    kept: dict[torch.device, int] = {}
    limits: dict[torch.device, float] = {}
    for parts, room in zip(stages, rooms, strict=True):
        if parts.device.type == "cuda":
            stage_bytes = measure_stage(parts, facts).total_bytes
            kept[parts.device] = kept.get(parts.device, 0) + stage_bytes
            limits[parts.device] = limits.get(parts.device, 0) + (inf if room is None else room)
    return [
        CardMemory(
            device=device,
            total_bytes=torch.cuda.mem_get_info(device)[1],
            free_bytes=_free_bytes(device),
            kept_bytes=kept_bytes,
            limit_bytes=None if limits[device] == inf else int(limits[device]),
        )
        for device, kept_bytes in kept.items()
    ]


def kv_bytes_of_stages(
    stages: Sequence[StageParts],
    cards: Sequence[CardMemory],
    *,
    wanted_bytes: Sequence[int | None],
) -> list[int]:
    """Each stage's KV cache: wanted_bytes where given, else all that its card has left, by layers
    where stages share it.

    Raises:
        ConfigError: steps and graphs leave no room on a card, or less than wanted.
    """
    rooms = {card.device: card.room_bytes for card in cards}
    for card in cards:
        own = zip(stages, wanted_bytes, strict=True)
        _check_room(
            card, least=sum(some or 0 for parts, some in own if parts.device == card.device)
        )
    kv_bytes = []
    for parts, wanted in zip(stages, wanted_bytes, strict=True):
        sharing = sum(other.num_layers for other in stages if other.device == parts.device)
        if wanted is None:
            wanted = rooms[parts.device] * parts.num_layers // sharing
        kv_bytes.append(wanted)
    return kv_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CardReport:
    """What start-up made of a card."""

    memory: CardMemory
    kv_bytes: int
    num_graphs: int
    capture_s: float

    @property
    def expected_peak_bytes(self) -> int:
        """Most that will be in use while serving, of all processes together."""
        memory = self.memory
        return memory.total_bytes - memory.free_bytes + memory.kept_bytes + self.kv_bytes

    def __str__(self) -> str:
        memory = self.memory
        return (
            f"{memory.device}: {self.num_graphs} CUDA graphs captured in {self.capture_s:.1f} s; "
            f"graphs and steps take {gib(memory.kept_bytes)} GiB, the KV cache "
            f"{gib(self.kv_bytes)} GiB; at most {gib(self.expected_peak_bytes)} of "
            f"{gib(memory.total_bytes)} GiB will be in use"
        )


def report_card(
    card: CardMemory, stages: Sequence[StageParts], graphs: Sequence[StepGraphs | None]
) -> CardReport:
    """Of the card's stages, whose caches are there and whose graphs are captured."""
    own = [index for index, parts in enumerate(stages) if parts.device == card.device]
    captured = [graphs[index] for index in own]
    return CardReport(
        memory=card,
        kv_bytes=sum(stages[index].kv_bytes for index in own),
        num_graphs=sum(each.num_captured for each in captured if each is not None),
        capture_s=sum(each.capture_s for each in captured if each is not None),
    )


def _check_room(card: CardMemory, *, least: int) -> None:
    if card.room_bytes > least:
        return
    wanted = f", but kv_cache_bytes asks for {gib(least)} GiB" if least else ""
    limit = ""
    if card.limit_bytes is not None:
        limit = f", of which memory_limit_bytes leaves {gib(max(0, card.limit_bytes))} GiB"
    raise ConfigError(
        f"{card.device} has {gib(card.free_bytes)} of {gib(card.total_bytes)} GiB free beside the "
        f"weights{limit}; steps and graphs take {gib(card.kept_bytes)} GiB and "
        f"{gib(card.margin_bytes)} GiB stay free as a margin: {gib(max(0, card.room_bytes))} GiB "
        f"are left for the KV cache{wanted}. Lower max_num_batched_tokens, max_num_seqs or "
        "kv_cache_bytes, list more devices, or take a smaller quantisation"
    )


def measure_stage(parts: StageParts, facts: PipelineFacts) -> StageMemory:
    """Take a GPU stage's measure with its own parts; gives back all that it takes."""
    device, num_tokens = parts.device, facts.max_batch_tokens
    with torch.cuda.device(device), torch.inference_mode():
        before = _free_bytes(device)
        parts = parts.as_probe()
        late_thread = LateAtOnce(stage=0, device=device, num_threads=1)
        runner = parts.make_runner(None, late_thread if facts.samples_late else None)
        hidden_TD = parts.make_hidden(num_tokens)
        fewest_chunks = min(facts.num_rows, -(-num_tokens // facts.context_length))
        # The last one for what it compiles.
        for num_chunks, chained_every, is_scored in (
            (facts.num_rows, 2, True),
            (facts.num_rows, 1, True),
            (fewest_chunks, 2, False),
        ):
            step = dearest_step(
                facts, num_chunks=num_chunks, chained_every=chained_every, is_scored=is_scored
            )
            runner.run(step, None if hidden_TD is None else hidden_TD[: step.num_tokens])
        torch.cuda.synchronize(device)
        workspace_bytes = before - torch.cuda.mem_get_info(device)[0]
        del runner, late_thread, hidden_TD
        graph_bytes = _measure_graphs(parts)
    del parts
    _free_bytes(device)
    return StageMemory(workspace_bytes=workspace_bytes, graph_bytes=graph_bytes)


def _measure_graphs(parts: StageParts) -> int:
    """Graphs share one pool, whose size the largest of each doubling decide; each costs a little
    more for itself, which the smallest show."""
    assert parts.shapes is not None, "a GPU stage has shapes"
    before, shapes = _free_bytes(parts.device), parts.shapes.captured()
    graphs = parts.make_graphs(parts.shapes)
    largest = {
        (shape.has_prefill, shape.num_tokens.bit_length()): shape for shape in reversed(shapes)
    }.values()
    smallest = [shape for shape in shapes[-3:] if shape not in largest]
    graphs.capture(sorted(largest, key=lambda shape: -shape.num_tokens))
    between = _free_bytes(parts.device)
    graphs.capture(smallest)
    after = _free_bytes(parts.device)
    each = (between - after) // max(1, len(smallest))
    return before - between + each * (len(shapes) - len(largest))


def dearest_step(
    facts: PipelineFacts, *, num_chunks: int, chained_every: int = 2, is_scored: bool = False
) -> MicroBatch:
    """As many tokens as a micro-batch and so many rows hold, of rows that all sample with
    everything that costs memory. Every row writes to the same KV block.

    chained_every: one of so many rows has a chain of samplers, and so has the only one. is_scored:
    prompts are, too, for which the last layer computes every token.
    """
    num_tokens = min(facts.max_batch_tokens, num_chunks * facts.context_length)
    num_tokens_S = np.full(num_chunks, num_tokens // num_chunks, dtype=np.int32)
    num_tokens_S[: num_tokens % num_chunks] += 1
    plain = SamplingParams(
        max_tokens=1,
        seed=0,
        top_p=0.9,
        top_k=50,
        frequency_penalty=0.5,
        logit_bias=((0, 1.0),),
        num_logprobs=min(MAX_LOGPROBS, facts.vocab_size),
        num_prompt_logprobs=min(MAX_LOGPROBS, facts.vocab_size) if is_scored else None,
    )
    chained = replace(
        plain,
        max_tokens=max(1, facts.context_length - int(num_tokens_S.max())),
        chain=SamplerChain(
            penalty_window=WHOLE_SEQUENCE,
            dry=Dry(multiplier=1.0),
            top_n_sigma=1.0,
            typical_p=0.9,
            xtc_probability=0.5,
            dynatemp_range=0.5,
        ),
    )
    assert chained.chain is not None, "it was given"
    counted = replace(chained, chain=replace(chained.chain, penalty_window=None))
    kinds = [
        (chained, counted)[row // chained_every % 2]
        if (row + num_chunks) % chained_every == chained_every - 1
        else plain
        for row in range(num_chunks)
    ]
    late = np.flatnonzero([kind.chain is not None for kind in kinds]).astype(np.int32)
    none = np.zeros(0, dtype=np.int32)
    return MicroBatch(
        step_id=0,
        num_decode_rows=0,
        rows_S=np.arange(num_chunks, dtype=np.int32),
        first_positions_S=np.zeros(num_chunks, dtype=np.int32),
        num_tokens_S=num_tokens_S,
        samples_S=np.ones(num_chunks, dtype=np.bool_),
        prefill_token_ids=np.zeros(num_tokens, dtype=np.int32),
        starts=tuple(
            RowStart(
                row=row,
                sampling=kinds[row],
                token_ids=np.zeros(count, dtype=np.int32),
                num_prompt_tokens=int(count),
            )
            for row, count in enumerate(num_tokens_S)
        ),
        block_rows=none,
        block_columns=none,
        block_ids=none,
        needs_step=None,
        late_seqs_L=late if facts.samples_late else None,
    )


def _free_bytes(device: torch.device) -> int:
    """Free on the card once torch has given back what it only keeps."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
