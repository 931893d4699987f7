"""Engine: the loop that turns arrivals and step outputs into micro-batches and token events.

Runs on its own thread and owns scheduler and sequences. One inbox takes everything that happens:
messages from the front half, outputs and failures from the stages. Knows neither HTTP nor torch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from pipeserve.core.batch import LateOutput, MicroBatch, PipelineFacts, StageFailure, StepOutput
from pipeserve.core.constraint import ConstraintFactory, WatchFactory
from pipeserve.engine.mask_workers import MasksReady, MaskWorkers, WatchReady
from pipeserve.engine.messages import (
    Abort,
    EngineFailed,
    EngineMessage,
    Finish,
    FrontMessage,
    GetStats,
    GrammarFailed,
    Shutdown,
    StatsReply,
    Submit,
    TokenEvents,
)
from pipeserve.engine.policy import AdmissionPolicy
from pipeserve.engine.scheduler import Scheduler
from pipeserve.engine.sequence import Sequence, SequenceStatus
from pipeserve.engine.sequence_times import SequenceTimer
from pipeserve.engine.stats import EngineStats
from pipeserve.engine.step_figures import StepRecorder

InboxItem = FrontMessage | StepOutput | LateOutput | StageFailure | MasksReady | WatchReady
Inbox = queue.SimpleQueue[InboxItem]


class Pipeline(Protocol):
    """What the engine needs of a pipeline. Outputs arrive in the engine's inbox."""

    @property
    def facts(self) -> PipelineFacts: ...

    def submit(self, batch: MicroBatch) -> None:
        """Queue a micro-batch at the first stage; returns at once."""

    def describe_stall(self) -> str:
        """Which stage is busy with which step, and for how long; for an error message."""


class _EngineEnd(Exception):
    """The loop is to end; `failure` is the last word to the front half, if any."""

    def __init__(self, failure: EngineFailed | None) -> None:
        super().__init__()
        self.failure = failure


class Engine:
    """Schedules sequences on one pipeline until it is told to stop or the pipeline dies.

    `post` takes a message to the front half and must be callable from the engine's thread.
    """

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        inbox: Inbox,
        post: Callable[[EngineMessage], None],
        stage_timeout_s: float,
        policy: AdmissionPolicy | None = None,
        constraints: ConstraintFactory | None = None,
        watches: WatchFactory | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        """constraints, watches: make them of grammars and of banned strings; None where no
        sequence brings one. scheduler: in place of the one that would be made for the policy."""
        self._pipeline = pipeline
        self._inbox = inbox
        self._post = post
        self._stage_timeout_s = stage_timeout_s
        self._scheduler = scheduler or Scheduler(pipeline.facts, policy)
        self._masks = MaskWorkers(constraints, watches, inbox.put)
        self._sequences: dict[int, Sequence] = {}
        self._recorder = StepRecorder(pipeline.facts.num_stages)
        self._timer = SequenceTimer(pipeline.facts)
        self._started_s = time.monotonic()
        self._last_progress_s = self._started_s
        self._last_late_s = self._started_s
        self._newest_step_id = -1
        self._late_outputs: deque[LateOutput] = deque()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float | None) -> bool:
        """Wait for the thread to end, after a Shutdown or a failure; False if it has not in time.

        timeout_s: None waits for ever.
        """
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while True:
                item = self._next_item()
                self._scheduler.tell_time(time.monotonic())
                self._handle(item)
                self._handle_waiting()
                self._submit()
        except _EngineEnd as end:
            if end.failure is not None:
                self._post(end.failure)
        except Exception as error:
            self._post(EngineFailed(error=f"engine: {error!r}", stalled=False))
            raise
        finally:
            self._masks.close()

    def _next_item(self) -> InboxItem:
        """Wait for the next thing to happen, but not past the moment a stage counts as stuck."""
        if not self._scheduler.is_owed:
            return self._inbox.get()
        since_s, awaited = self._last_progress_s, "step"
        if self._scheduler.has_late_in_flight and self._last_late_s < since_s:
            since_s, awaited = self._last_late_s, "late token"  # steps may well go on
        patience_s = since_s + self._stage_timeout_s - time.monotonic()
        try:
            return self._inbox.get(timeout=max(0.0, patience_s))
        except queue.Empty:
            raise _EngineEnd(
                EngineFailed(
                    error=f"no {awaited} came back for {self._stage_timeout_s:g} s "
                    f"(stage_timeout_s): {self._pipeline.describe_stall()}",
                    stalled=True,
                )
            ) from None

    def _handle_waiting(self) -> None:
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return
            self._handle(item)

    def _handle(self, item: InboxItem) -> None:
        match item:
            case StepOutput():
                self._take_output(item)
            case LateOutput():
                self._take_late(item)
            case MasksReady():
                self._take_masks(item)
            case WatchReady():
                self._take_watch(item)
            case Submit():
                self._add(item)
            case Finish():
                self._end(item.seq_id, SequenceStatus.FINISHED)
            case Abort():
                self._end(item.seq_id, SequenceStatus.ABORTED)
            case GetStats():
                self._post(StatsReply(reply_id=item.reply_id, stats=self._stats()))
            case StageFailure():
                error = f"stage {item.stage} failed: {item.error}"
                raise _EngineEnd(EngineFailed(error=error, stalled=False))
            case Shutdown():
                raise _EngineEnd(None)

    def _take_output(self, output: StepOutput) -> None:
        self._last_progress_s = time.monotonic()
        for scored in output.prompt_logprobs:
            self._post(scored)
        events = self._scheduler.update(output)
        oldest_late = self._scheduler.oldest_late_step_id
        if oldest_late is not None and oldest_late >= output.step_id:
            self._last_late_s = self._last_progress_s  # such tokens are sampled behind their step
        is_idle = not self._scheduler.has_steps_in_flight
        self._recorder.note_output(output.stage_spans, self._last_progress_s, is_idle=is_idle)
        self._timer.note_output(output.stage_spans)
        self._tell(events)
        self._newest_step_id = output.step_id
        self._tell_late()

    def _take_late(self, output: LateOutput) -> None:
        self._last_progress_s = self._last_late_s = time.monotonic()
        self._late_outputs.append(output)
        self._tell_late()

    def _tell_late(self) -> None:
        """Of the steps whose own outputs were told: what else they gave, such as the scores of a
        prompt, goes before."""
        while self._late_outputs and self._late_outputs[0].step_id <= self._newest_step_id:
            self._tell(self._scheduler.update_late(self._late_outputs.popleft()))

    def _tell(self, events: TokenEvents) -> None:
        """What has just come out, to all whom it concerns."""
        for seq_id, reason in zip(events.seq_ids, events.finish_reasons, strict=True):
            if reason is not None:
                self._forget(seq_id)
        if tokens := self._scheduler.take_constrained_tokens():
            self._masks.advance([(sequence.seq_id, token_ids) for sequence, token_ids in tokens])
        if events.seq_ids:
            self._post(events)
        for sequence in self._scheduler.take_stuck():
            self._fail(
                sequence.seq_id,
                "banned_strings leave no likely token to go on with; send fewer, or none that are "
                "so short",
            )

    def _take_masks(self, ready: MasksReady) -> None:
        for seq_id, allowed in ready.masks:
            sequence = self._sequences.get(seq_id)
            if sequence is not None:
                self._scheduler.allow(sequence, allowed)
        for seq_id, error in ready.failures:
            self._fail(seq_id, error)

    def _take_watch(self, ready: WatchReady) -> None:
        sequence = self._sequences.get(ready.seq_id)
        if ready.watch is None:
            self._fail(ready.seq_id, ready.failure)
        elif sequence is not None:
            self._scheduler.watch(sequence, ready.watch)

    def _fail(self, seq_id: int, error: str) -> None:
        if seq_id in self._sequences:
            self._end(seq_id, SequenceStatus.ABORTED)
            self._post(GrammarFailed(seq_id=seq_id, error=error))

    def _add(self, message: Submit) -> None:
        sequence = Sequence(
            seq_id=message.seq_id,
            prompt_token_ids=message.prompt_token_ids,
            sampling=message.sampling,
            admission=message.admission,
            is_constrained=message.grammar is not None,
            is_watched=message.banned is not None,
        )
        self._sequences[message.seq_id] = sequence
        if message.mark is not None:
            self._timer.note_arrival(message.seq_id, message.mark)
        self._scheduler.add(sequence)
        if message.grammar is not None:
            assert message.banned is None, "nothing that a grammar demands is withdrawn"
            self._masks.begin(message.seq_id, message.grammar)
        if message.banned is not None:
            self._masks.watch(message.seq_id, message.banned, message.prompt_token_ids)
        account = message.admission.account
        self._recorder.note_arrival(message.seq_id, account, time.monotonic())

    def _end(self, seq_id: int, status: SequenceStatus) -> None:
        self._recorder.note_end(seq_id)
        sequence = self._forget(seq_id)
        if sequence is not None:  # else its last token crossed this message
            self._scheduler.end(sequence, status)

    def _forget(self, seq_id: int) -> Sequence | None:
        self._masks.forget(seq_id)
        times = self._timer.take(seq_id, time.monotonic())
        if times is not None:
            self._post(times)
        return self._sequences.pop(seq_id, None)

    def _submit(self) -> None:
        was_idle = not self._scheduler.is_owed
        has_late = self._scheduler.has_late_in_flight
        while (batch := self._scheduler.schedule()) is not None:
            if was_idle:  # patience starts with the first step after a rest
                self._last_progress_s = time.monotonic()
                was_idle = False
            if batch.late_seqs_L is not None and not has_late:
                self._last_late_s = time.monotonic()
                has_late = True
            self._recorder.note_submitted(batch, time.monotonic())
            self._timer.note_submitted(batch)
            self._pipeline.submit(batch)

    def _stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            num_blocks=scheduler.pool.num_blocks,
            num_free_blocks=scheduler.pool.num_free,
            num_steps=scheduler.num_steps,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_generated_tokens=scheduler.num_generated_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_queries=scheduler.prefix_cache.num_queried_tokens,
            num_prefix_hits=scheduler.prefix_cache.num_hit_tokens,
            stage_busy_s=self._recorder.stage_busy_s,
            figures=self._recorder.figures(),
            uptime_s=time.monotonic() - self._started_s,
        )
