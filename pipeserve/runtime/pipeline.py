"""Pipeline: a model cut over stages that work on several micro-batches at once.

Built by the daemon and used from the engine's thread; knows the engine as a function to post to.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeserve.config import Config
from pipeserve.core.batch import MicroBatch, PipelineFacts
from pipeserve.core.loading import LoadReport, OnProgress
from pipeserve.gguf.reader import GGUFFile
from pipeserve.models.layers import Decoder
from pipeserve.models.registry import check_model
from pipeserve.runtime.collector import Collector, Post
from pipeserve.runtime.cuda_graphs import StepGraphs
from pipeserve.runtime.hand_off import make_transfers
from pipeserve.runtime.late_thread import LateThread
from pipeserve.runtime.link import Handoff, Link
from pipeserve.runtime.loading import load_decoders
from pipeserve.runtime.memory import (
    CardReport,
    kv_bytes_of_stages,
    measure_cards,
    report_card,
)
from pipeserve.runtime.onednn_caches import bound_onednn_caches
from pipeserve.runtime.placement import Placement, place
from pipeserve.runtime.plan import PipelinePlan, plan_pipeline, size_caches
from pipeserve.runtime.slowdown import slow_down
from pipeserve.runtime.stage import Outlet, Runner, Stage
from pipeserve.runtime.stage_parts import StageParts, make_parts
from pipeserve.runtime.token_pool import TokenPool
from pipeserve.runtime.transfer import Transfer


class Pipeline:
    """Stage threads and the links between them, from the first submit to `close`."""

    def __init__(
        self,
        *,
        facts: PipelineFacts,
        runners: Sequence[Runner],
        cards: Sequence[CardReport] = (),
        devices: Sequence[torch.device],
        transfers: Sequence[Transfer],
        token_pool: TokenPool,
        threads_per_stage: int,
        post: Post,
        late_thread: LateThread | None = None,
    ) -> None:
        """Start one thread per runner. Pipeline.start makes the runners of a model file.

        transfers: of hidden states, from each stage but the last to the next. late_thread: of the
        last stage's runner, not begun; None where nothing is sampled late.
        """
        self.facts = facts
        self.cards = cards
        self._token_pool = token_pool
        self._late_thread = late_thread
        self._links = [Link() for _ in runners]
        last = len(runners) - 1
        self._collector = None
        if devices[last].type == "cuda":
            self._collector = Collector(stage=last, device=devices[last], post=post)
        self._stages = [
            Stage(
                index=index,
                device=device,
                num_threads=threads_per_stage,
                runner=runner,
                token_pool=token_pool,
                inlet=self._links[index],
                outlet=Outlet(link=self._links[index + 1], transfer=transfers[index])
                if index < last
                else None,
                collector=self._collector if index == last else None,
                post=post,
                on_failure=self._end_stages,
            )
            for index, (runner, device) in enumerate(zip(runners, devices, strict=True))
        ]
        self._threads = [stage.thread for stage in self._stages]
        if self._collector is not None:
            self._threads.append(self._collector.thread)
        for thread in self._threads:
            thread.start()
        if late_thread is not None:
            late_thread.begin(post=post, on_failure=self._end_stages)
            self._threads.append(late_thread.thread)

    @classmethod
    def start(
        cls,
        gguf_file: GGUFFile,
        config: Config,
        devices: Sequence[str],
        *,
        post: Post,
        on_progress: OnProgress,
        slowdowns: Sequence[float] | None = None,
        samples_late: bool | None = None,
    ) -> Pipeline:
        """Check the file, cut its layers over `devices`, load them and start the stages.

        `post` is called from stage threads and the late thread, with every StepOutput in order,
        every LateOutput in order, and at most one StageFailure per thread. slowdowns: for tests, by
        how much each of `devices` is made slower. samples_late: for tests, instead of what the last
        stage's device says.

        Raises:
            ModelError: the file cannot be served.
            ConfigError: options do not fit the model or this machine.
        """
        bound_onednn_caches()
        model = check_model(gguf_file)
        placement = place(gguf_file, model, config, devices, slowdowns=slowdowns)
        if placement.reason is not None:
            on_progress(LoadReport(text=placement.reason))
        plan = plan_pipeline(
            model, config, placement.devices, placement.split, rooms=placement.rooms
        )
        if samples_late is not None:
            plan = replace(plan, facts=replace(plan.facts, samples_late=samples_late))
        decoders = load_decoders(
            gguf_file,
            plan.model,
            plan.ranges,
            devices=plan.devices,
            config=config,
            on_progress=on_progress,
        )
        transfers = make_transfers(plan, config.hand_off, on_progress)
        token_pool = TokenPool(
            num_rows=plan.facts.num_rows, device=plan.devices[0], transfer=transfers.token_ids
        )
        stages = _make_stages(plan, decoders, token_pool)
        cards = measure_cards(stages, plan.facts, placement.rooms)
        kv_bytes = kv_bytes_of_stages(stages, cards, wanted_bytes=plan.kv_bytes)
        plan = size_caches(plan, config, kv_bytes)
        stages = [parts.with_caches(num_blocks=plan.facts.num_blocks) for parts in stages]
        graphs = [parts.capture() for parts in stages]
        reports = [report_card(card, stages, graphs) for card in cards]
        for report in reports:
            torch.cuda.synchronize(report.memory.device)  # stages have streams of their own
            on_progress(LoadReport(text=str(report)))
        late_thread = _make_late_thread(plan, config)
        return cls(
            facts=plan.facts,
            cards=reports,
            runners=_make_runners(stages, graphs, late_thread, placement, slowdowns),
            devices=plan.devices,
            transfers=transfers.hidden,
            token_pool=token_pool,
            threads_per_stage=config.threads_per_stage,
            post=post,
            late_thread=late_thread,
        )

    def submit(self, batch: MicroBatch) -> None:
        """Queue a micro-batch at the first stage; returns at once."""
        self._links[0].send(Handoff(batch=batch, hidden_TD=None, spans=()))

    def close(self, timeout_s: float) -> bool:
        """End the stages, each after its current step. True if all threads ended in time."""
        self._end_stages()
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def describe_stall(self) -> str:
        """Which stage is busy with which step, and for how long; for an error message."""
        activities = [(stage, stage.activity) for stage in self._stages]
        busy = [
            (now.since_s, f"{stage.name} has been computing step {now.step_id}")
            for stage, now in activities
            if now is not None
        ]
        # Stages on GPUs only launch: one that hangs is seen where its results are waited for.
        awaited = None if busy or self._collector is None else self._collector.awaited
        if awaited is not None:
            what = f"step {awaited.step_id} was launched on every stage and has not come back"
            busy.append((awaited.since_s, what))
        longest = [min(busy)] if busy else []
        late_s = None if self._late_thread is None else self._late_thread.busy_since_s
        if late_s is not None:  # which may wait for the step in turn
            longest.append((late_s, "rows with a chain of samplers have been sampled"))
        if not longest:
            return "no stage is computing; all wait for work"
        now_s = time.monotonic()
        return ", and ".join(f"{what} for {now_s - since_s:.1f} s" for since_s, what in longest)

    def _end_stages(self) -> None:
        for link in self._links:
            link.close()
        self._token_pool.close()
        if self._collector is not None:
            self._collector.close()
        if self._late_thread is not None:
            self._late_thread.close()


def _make_stages(
    plan: PipelinePlan, decoders: Sequence[Decoder], token_pool: TokenPool
) -> list[StageParts]:
    """In order; their KV caches are not sized yet."""
    return [
        make_parts(decoder, device, facts=plan.facts, kv_dtype=kv_dtype, token_pool=token_pool)
        for decoder, device, kv_dtype in zip(decoders, plan.devices, plan.kv_dtypes, strict=True)
    ]


def _make_late_thread(plan: PipelinePlan, config: Config) -> LateThread | None:
    if not plan.facts.samples_late:
        return None
    last = len(plan.devices) - 1
    return LateThread(stage=last, device=plan.devices[last], num_threads=config.threads_per_stage)


def _make_runners(
    stages: Sequence[StageParts],
    graphs: Sequence[StepGraphs | None],
    late_thread: LateThread | None,
    placement: Placement,
    slowdowns: Sequence[float] | None,
) -> Sequence[Runner]:
    runners = [
        parts.make_runner(own, late_thread) for parts, own in zip(stages, graphs, strict=True)
    ]
    if slowdowns is None:
        return runners
    factors = [slowdowns[which] for which in placement.order]
    return slow_down(runners, factors, placement.devices)
