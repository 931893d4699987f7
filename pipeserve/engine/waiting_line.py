"""WaitingLine: who is next, by class, priority, fair shares among accounts, and arrival.

Owned by the engine thread. The clock is what it is told.

Shares are counted in tokens, by start-time fair queueing (Goyal, Vin, Cheng, 1996): each account
has a tag that grows by the tokens it is served, the smallest tag goes first, and whoever has had
nothing to wait for starts no lower than the smallest tag of those that wait.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from pipeserve.engine.sequence import Sequence

Standing = tuple[bool, int, int]

MAX_IDLE_ACCOUNTS = 1024
"""Accounts without a sequence whose tags are remembered."""


def standing(sequence: Sequence) -> Standing:
    """Its place within its account; smaller is earlier, and it never changes."""
    return (sequence.admission.is_background, sequence.admission.priority, sequence.ordinal)


@dataclass(slots=True, eq=False)
class Account:
    """The sequences of one API key, and what they were served."""

    tag: float
    waiting: list[Sequence] = field(default_factory=list)
    """In order of their standing."""
    num_running: int = 0


class WaitingLine:
    """Sequences that wait for a row, and the shares of all accounts."""

    def __init__(self, *, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._accounts: dict[str, Account] = {}
        self._start_tag = 0.0
        self._num_waiting = 0
        self._num_arrived = 0
        self._last_overdue_s = 0.0
        self._overdue_from_s = 0.0
        """Nobody is overdue before."""
        self.num_background = 0
        """Running sequences of the background class."""
        self.now_s = 0.0
        self.num_tokens = 0
        """Known tokens of all that wait."""

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def num_accounts(self) -> int:
        """Accounts that are remembered."""
        return len(self._accounts)

    def __iter__(self) -> Iterator[Sequence]:
        for account in self._accounts.values():
            yield from account.waiting

    def arrive(self, sequence: Sequence) -> None:
        """A new sequence: the last of its standing."""
        sequence.ordinal = self._num_arrived
        sequence.arrival_s = self.now_s
        self._num_arrived += 1
        self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        """A sequence waits, at the place that its arrival gives it."""
        account = self._account(sequence)
        if not account.waiting:
            account.tag = max(account.tag, self._start_tag)
        insort(account.waiting, sequence, key=standing)
        self._overdue_from_s = min(self._overdue_from_s, sequence.arrival_s + self._max_wait_s)
        self._num_waiting += 1
        self.num_tokens += len(sequence.token_ids)

    def remove(self, sequence: Sequence) -> None:
        """It waits no more."""
        account = self._account(sequence)
        index = bisect_left(account.waiting, standing(sequence), key=standing)
        assert account.waiting[index] is sequence, f"sequence {sequence.seq_id} does not wait"
        del account.waiting[index]
        self._num_waiting -= 1
        self.num_tokens -= len(sequence.token_ids)

    def note_start(self, sequence: Sequence) -> None:
        """It took a row."""
        if self.is_overdue(sequence):
            self._last_overdue_s = self.now_s
        self.remove(sequence)
        self._account(sequence).num_running += 1
        self.num_background += sequence.admission.is_background

    def note_stop(self, sequence: Sequence) -> None:
        """It gave its row back."""
        self._account(sequence).num_running -= 1
        self.num_background -= sequence.admission.is_background

    def num_running(self, sequence: Sequence) -> int:
        """Rows of its account."""
        return self._account(sequence).num_running

    def need_not_wait(self, sequence: Sequence) -> bool:
        """Whether others have to make way for it: it is the first of its account, or has waited
        too long. Nobody in the background is."""
        if sequence.admission.is_background:
            return False
        return self.num_running(sequence) == 0 or self.is_overdue(sequence)

    def tag(self, sequence: Sequence) -> float:
        """Where its account stands once it waits."""
        return max(self._account(sequence).tag, self._start_tag)

    def charge(self, account: str, num_tokens: int) -> None:
        """An account with running sequences was served."""
        self._accounts[account].tag += num_tokens

    def begin_step(self, prefilling: Iterable[Sequence]) -> None:
        """Newcomers start where the account stands that is next, of those that have prompts
        waiting or being computed. Where there are none nobody lacks anything: all are even."""
        tags = [account.tag for account in self._accounts.values() if account.waiting]
        tags += [self._account(sequence).tag for sequence in prefilling]
        if tags:
            self._start_tag = max(self._start_tag, min(tags))
        elif self._accounts:
            self._start_tag = max(account.tag for account in self._accounts.values())

    def order(self, sequence: Sequence) -> tuple[bool, int, float, bool, int]:
        """Smaller is next, whether it waits for a row or for its prompt to be computed on."""
        account = self._account(sequence)
        is_background, priority, ordinal = standing(sequence)
        return is_background, priority, account.tag, account.num_running > 0, ordinal

    def first(self, skipped: Collection[Sequence] = ()) -> Sequence | None:
        """Who takes the next row, but for those in `skipped`."""
        if (overdue := self._overdue()) is not None and overdue not in skipped:
            return overdue
        heads = [
            head
            for account in self._accounts.values()
            if (head := next((s for s in account.waiting if s not in skipped), None)) is not None
        ]
        return min(heads, key=self.order, default=None)

    def is_overdue(self, sequence: Sequence) -> bool:
        """Whether it goes first because it has waited longest, and long enough."""
        return self._overdue() is sequence

    def _overdue(self) -> Sequence | None:
        if self.now_s < max(self._overdue_from_s, self._last_overdue_s + self._max_wait_s):
            return None
        oldest = min(
            (sequence for sequence in self if not sequence.admission.is_background),
            key=lambda sequence: sequence.ordinal,
            default=None,
        )
        arrival_s = self.now_s if oldest is None else oldest.arrival_s
        self._overdue_from_s = arrival_s + self._max_wait_s
        return oldest if self.now_s >= self._overdue_from_s else None

    def _account(self, sequence: Sequence) -> Account:
        name = sequence.admission.account
        account = self._accounts.get(name)
        if account is None:
            if len(self._accounts) >= MAX_IDLE_ACCOUNTS:
                self._forget_idle()
            account = self._accounts[name] = Account(tag=self._start_tag)
        return account

    def _forget_idle(self) -> None:
        self._accounts = {
            name: account
            for name, account in self._accounts.items()
            if account.waiting or account.num_running
        }

    def check_integrity(self, running: Collection[Sequence]) -> None:
        """Assert that the counts are right; for tests and idle moments."""
        for account in self._accounts.values():
            own = [each for each in running if self._account(each) is account]
            assert len(own) == account.num_running, "running sequences are miscounted"
            assert account.waiting == sorted(account.waiting, key=standing), "a line is disordered"
        waiting = list(self)
        assert len(waiting) == self._num_waiting, "waiting sequences are miscounted"
        num_tokens = sum(len(sequence.token_ids) for sequence in waiting)
        assert num_tokens == self.num_tokens, "waiting tokens are miscounted"
