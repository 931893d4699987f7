"""MaskWorkers: threads that compile grammars and find out which tokens may come next; they prepare
watches, too.

Beside the engine's thread, which never waits for them: what they find goes to its inbox. Which
grammar belongs to whom is the engine thread's; a constraint is used by one job at a time, since a
sequence has no next token before its mask has come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pipeserve.core.constraint import (
    BannedStrings,
    ConstraintFactory,
    FreeRun,
    Grammar,
    TextWatch,
    TokenConstraint,
    WatchFactory,
    WordArray,
)
from pipeserve.errors import GrammarError

SLOW_S = 0.005
"""A grammar whose mask took longer has its next ones made on the slow thread."""
NUM_QUICK_THREADS = 2
NUM_SLOW_THREADS = 2
"""Also compile."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MasksReady:
    """Workers to engine: what the next tokens of some sequences may be."""

    masks: tuple[tuple[int, WordArray | FreeRun], ...]
    """(sequence, words of its mask, or that it needs none for a while)."""
    failures: tuple[tuple[int, str], ...]
    """(sequence, why its grammar cannot be followed)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WatchReady:
    """Workers to engine: a sequence's watch, or why it has none."""

    seq_id: int
    watch: TextWatch | None
    failure: str = ""


@dataclass(slots=True, eq=False)
class _Follower:
    """One sequence's grammar; touched by the job that is its turn, and no other."""

    seq_id: int
    grammar: Grammar
    constraint: TokenConstraint | None = None
    """None before it is compiled."""
    is_slow: bool = True
    is_forgotten: bool = False


@dataclass(slots=True, eq=False)
class _Group:
    """Masks that are told together, so that their rows go on in one step."""

    num_missing: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    masks: list[tuple[int, WordArray | FreeRun]] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)


class MaskWorkers:
    """Owned by the engine's thread; `post` is called on the workers' threads."""

    def __init__(
        self,
        build: ConstraintFactory | None,
        build_watch: WatchFactory | None,
        post: Callable[[MasksReady | WatchReady], None],
    ) -> None:
        """None for what is never asked of it."""
        self._build = build
        self._build_watch = build_watch
        self._post = post
        self._followers: dict[int, _Follower] = {}
        # Threads start with the first job.
        self._quick = ThreadPoolExecutor(NUM_QUICK_THREADS, thread_name_prefix="masks")
        self._slow = ThreadPoolExecutor(NUM_SLOW_THREADS, thread_name_prefix="slow-masks")
        self._watching = ThreadPoolExecutor(1, thread_name_prefix="watches")

    def begin(self, seq_id: int, grammar: Grammar) -> None:
        """Compile a sequence's grammar and find its first mask."""
        assert self._build is not None, "a grammar comes only where it was found to compile"
        follower = self._followers[seq_id] = _Follower(seq_id, grammar)
        self._slow.submit(self._follow, follower, (), _Group(1))

    def watch(self, seq_id: int, banned: BannedStrings, prompt_token_ids: Sequence[int]) -> None:
        """Make a sequence's watch."""
        assert self._build_watch is not None, "banned strings come only where they are taken"
        self._watching.submit(self._make_watch, seq_id, banned, prompt_token_ids)

    def advance(self, tokens: Sequence[tuple[int, Sequence[int]]]) -> None:
        """(sequence, its tokens since the last mask), each once: find what comes after them."""
        known = [(self._followers[seq_id], token_ids) for seq_id, token_ids in tokens]
        num_quick = sum(not follower.is_slow for follower, _ in known)
        together = _Group(num_quick)
        for follower, token_ids in known:
            if follower.is_slow:
                self._slow.submit(self._follow, follower, token_ids, _Group(1))
            else:
                self._quick.submit(self._follow, follower, token_ids, together)

    def forget(self, seq_id: int) -> None:
        """The sequence has ended."""
        follower = self._followers.pop(seq_id, None)
        if follower is not None:
            follower.is_forgotten = True

    def close(self) -> None:
        """Drop what is queued; threads end with what they are at."""
        for pool in (self._quick, self._slow, self._watching):
            pool.shutdown(wait=False, cancel_futures=True)

    def _make_watch(
        self, seq_id: int, banned: BannedStrings, prompt_token_ids: Sequence[int]
    ) -> None:
        """On the one thread for this."""
        assert self._build_watch is not None
        try:
            watch = self._build_watch(banned, prompt_token_ids)
        except Exception as error:  # the thread's top: only this sequence ends by it
            failure = f"banned strings cannot be watched for: {error!r}"
            self._post(WatchReady(seq_id=seq_id, watch=None, failure=failure))
        else:
            self._post(WatchReady(seq_id=seq_id, watch=watch))

    def _follow(self, follower: _Follower, token_ids: Sequence[int], group: _Group) -> None:
        """On a worker's thread."""
        mask_W, failure = None, ""
        try:
            if not follower.is_forgotten:
                mask_W = self._next_mask(follower, token_ids)
        except GrammarError as error:
            failure = str(error)
        except Exception as error:  # the thread's top: only this sequence ends by it
            failure = f"the grammar failed: {error!r}"
        with group.lock:
            if mask_W is not None:
                group.masks.append((follower.seq_id, mask_W))
            elif failure:
                group.failures.append((follower.seq_id, failure))
            group.num_missing -= 1
            if group.num_missing == 0 and (group.masks or group.failures):
                self._post(MasksReady(masks=tuple(group.masks), failures=tuple(group.failures)))

    def _next_mask(self, follower: _Follower, token_ids: Sequence[int]) -> WordArray | FreeRun:
        if follower.constraint is None:
            assert self._build is not None
            follower.constraint = self._build(follower.grammar)
        started_s = time.perf_counter()
        for token_id in token_ids:
            follower.constraint.accept(token_id)
        mask_W = follower.constraint.allowed()
        follower.is_slow = time.perf_counter() - started_s > SLOW_S
        return mask_W
