"""EngineHalf: scheduler and stages of one model, put together; the only place where they meet.

Built in the daemon's own process or in one beside it. Must not know HTTP or the event loop, and of
text only what compiles grammars and watches for banned strings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog

from pipeserve.config import Config
from pipeserve.core.batch import PipelineFacts
from pipeserve.core.constraint import ConstraintFactory, WatchFactory
from pipeserve.core.layout import LayoutSurvey
from pipeserve.core.loading import OnProgress
from pipeserve.engine.engine import Engine, Inbox
from pipeserve.engine.messages import EngineMessage, Load, SurveyLayouts
from pipeserve.engine.policy import AdmissionPolicy
from pipeserve.gguf.reader import GGUFFile
from pipeserve.layout import is_open
from pipeserve.runtime.devices import resolve_devices
from pipeserve.runtime.layouts import find_devices, survey_layouts
from pipeserve.runtime.pipeline import Pipeline
from pipeserve.text.banned_text import BannedTextWatches
from pipeserve.text.grammar import GrammarCompiler
from pipeserve.text.tokenizer import Tokenizer
from pipeserve.toolchain import check_toolchain

log = structlog.get_logger()


class EngineHalf:
    """A loaded model behind an inbox. `start` once, `close` once."""

    def __init__(
        self,
        *,
        config: Config,
        pipeline: Pipeline,
        inbox: Inbox,
        constraints: ConstraintFactory,
        watches: WatchFactory,
    ) -> None:
        self._config = config
        self._constraints = constraints
        self._watches = watches
        self._pipeline = pipeline
        self._inbox = inbox
        self._engine: Engine | None = None

    @classmethod
    def load(cls, order: Load, *, inbox: Inbox, on_progress: OnProgress) -> EngineHalf:
        """Load the model and start its stages; blocks for as long as that takes.

        inbox: where the front half puts its messages, before `start` or after.

        Raises:
            PipeserveError: the model cannot be served here, or options do not fit it.
        """
        config = order.config
        with GGUFFile.open(order.model_path) as gguf_file:
            if _uses_cuda(config):
                check_toolchain()
            pipeline = Pipeline.start(
                gguf_file, config, config.devices, post=inbox.put, on_progress=on_progress
            )
        read_tokenizer = partial(_read_tokenizer, order.model_path)
        grammars = GrammarCompiler(read_tokenizer, vocab_size=pipeline.facts.vocab_size)
        return cls(
            config=config,
            pipeline=pipeline,
            inbox=inbox,
            constraints=grammars.build,
            watches=BannedTextWatches(read_tokenizer).build,
        )

    @property
    def facts(self) -> PipelineFacts:
        return self._pipeline.facts

    def start(self, deliver: Callable[[EngineMessage], None]) -> None:
        """Take messages from now on; `deliver` is called on the engine's thread."""
        self._engine = Engine(
            pipeline=self._pipeline,
            inbox=self._inbox,
            post=deliver,
            stage_timeout_s=self._config.stage_timeout_s,
            policy=AdmissionPolicy.from_config(self._config),
            constraints=self._constraints,
            watches=self._watches,
        )
        self._engine.start()

    def wait_ended(self) -> None:
        """Wait until the engine's thread has ended, after a Shutdown or a failure."""
        assert self._engine is not None, "start comes first"
        self._engine.join(None)

    def close(self, timeout_s: float) -> None:
        """End the threads; call it after a Shutdown or a failure. Logs which did not end."""
        has_ended = self._engine is None or self._engine.join(timeout_s)
        if not (has_ended and self._pipeline.close(timeout_s)):
            log.error("a thread did not end", stages=self._pipeline.describe_stall())


def survey(order: SurveyLayouts) -> LayoutSurvey:
    """What the choice of a layout needs to know; measures only where there is one.

    Raises:
        PipeserveError: the model cannot be served here, or options do not fit it.
    """
    config = order.config
    with GGUFFile.open(order.model_path) as gguf_file:
        devices = find_devices(gguf_file, config)
        if not is_open(config, devices):
            return LayoutSurvey(devices=devices, forecasts=())
        check_toolchain()
        return survey_layouts(gguf_file, config)


def _read_tokenizer(path: Path) -> Tokenizer:
    with GGUFFile.open(path) as gguf_file:
        return Tokenizer.from_gguf(gguf_file)


def _uses_cuda(config: Config) -> bool:
    return any(device.type == "cuda" for device in resolve_devices(config.devices, num_layers=1))
