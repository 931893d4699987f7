"""LateThread: a thread and a stream for what may come behind the last stage's steps.

Knows what it does only as functions; their results are posted beside those of the steps.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pipeserve.core.batch import LateOutput, StageFailure
from pipeserve.runtime.collector import Post

Work = Callable[[], LateOutput | None]
"""Something to do; what comes of it is posted."""


class LateThread:
    """Does one thing after another. On a GPU each waits for what the stage's stream had been given
    when it was added, and so may use and free memory that the stage has used before."""

    def __init__(self, *, stage: int, device: torch.device, num_threads: int) -> None:
        """Of the stage with this index, on its device."""
        self._stage = stage
        self._device = device
        self._num_threads = num_threads
        self._post: Post | None = None
        self._on_failure: Callable[[], None] | None = None
        self._queue: queue.SimpleQueue[tuple[Work, torch.cuda.Event | None] | None] = (
            queue.SimpleQueue()
        )
        self._changed = threading.Condition()
        self._num_left = 0
        self._is_over = False
        self._busy_since_s: float | None = None
        # Of the least priority, which is the default: those of stages have a higher one.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = threading.Thread(target=self._main, name="late sampler", daemon=True)

    @property
    def busy_since_s(self) -> float | None:
        """By time.monotonic; None while there is nothing to do. May be read from any thread."""
        return self._busy_since_s

    def begin(self, *, post: Post, on_failure: Callable[[], None]) -> None:
        """Start the thread. It ends with a StageFailure if something fails."""
        self._post, self._on_failure = post, on_failure
        self.thread.start()

    def add(self, work: Work) -> None:
        """Do this behind what was added before. On the stage's thread."""
        with self._changed:
            self._num_left += 1
        self._queue.put((work, self._mark()))

    def do_at_once(self, work: Callable[[], None]) -> None:
        """Do this on the calling thread, the stage's, behind all that was added; the stage's stream
        goes on behind it."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_left == 0 or self._is_over)
        if self._stream is None:
            work()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def close(self) -> None:
        """End the thread after what was added."""
        self._queue.put(None)

    def _mark(self) -> torch.cuda.Event | None:
        """Behind what the stage's stream has been given."""
        if self._stream is None:
            return None
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def _main(self) -> None:
        assert self._post is not None and self._on_failure is not None, "begun"
        torch.set_num_threads(self._num_threads)
        torch.get_num_threads()  # makes the count final, as on a stage's thread
        try:
            with self._own_stream(), torch.inference_mode():
                while (item := self._queue.get()) is not None:
                    self._do(*item, self._post)
                    del item  # what it holds need not wait for the next one
        except Exception as error:
            self._post(StageFailure(stage=self._stage, error=f"{type(error).__name__}: {error}"))
            self._on_failure()
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(self._stream):
            yield
        # What was launched uses memory that whoever closes the pipeline may free.
        self._stream.synchronize()

    def _do(self, work: Work, mark: torch.cuda.Event | None, post: Post) -> None:
        self._busy_since_s = time.monotonic()
        if self._stream is not None and mark is not None:
            self._stream.wait_event(mark)
        output = work()
        self._busy_since_s = None
        if output is not None:
            post(output)
        with self._changed:
            self._num_left -= 1
            self._changed.notify_all()


class LateAtOnce(LateThread):
    """For a trial: no thread, everything is done when it is added and nothing is posted."""

    def add(self, work: Work) -> None:
        self.do_at_once(lambda: self._forget(work()))

    @staticmethod
    def _forget(output: LateOutput | None) -> None:
        """Nobody waits for it."""
