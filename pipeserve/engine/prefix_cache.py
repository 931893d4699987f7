"""PrefixCache: which blocks a prompt need not compute, because others have or are about to.

Owned by the engine thread. Steps run in order on every stage, so what a submitted step computes
may be read by every later one; nothing may be read in the step that computes it.
"""

from __future__ import annotations

from pipeserve.engine.block_hashes import extend_hashes, root_hash
from pipeserve.engine.block_pool import BlockPool
from pipeserve.engine.sequence import Sequence


class PrefixCache:
    """Names the full blocks of running sequences and finds them for others.

    A running sequence has promised the blocks of its prompt that it has yet to compute: whoever
    needs the same ones next had better wait for them.
    """

    def __init__(self, pool: BlockPool, *, block_size: int, is_shared: bool = True) -> None:
        self._pool = pool
        self._block_size = block_size
        self._is_shared = is_shared
        self._promises: dict[bytes, Sequence] = {}
        self.num_queried_tokens = 0
        """Prompt tokens that were looked up, once per sequence."""
        self.num_hit_tokens = 0
        """Of them, those that were found."""

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks that hold its first tokens; at least one token is left to be computed."""
        found: list[int] = []
        count = self._num_readable(sequence)
        for name in self._names(sequence, count)[:count]:
            block_id = self._pool.find(name)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def who_computes(self, sequence: Sequence, num_found: int) -> Sequence | None:
        """The running sequence that is to compute the next block after those that were found."""
        count = self._num_readable(sequence)
        if num_found >= count:
            return None
        return self._promises.get(self._names(sequence, count)[num_found])

    def note_start(self, sequence: Sequence, num_found: int) -> None:
        """A sequence was admitted with so many blocks found: it promises its others."""
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = num_found * self._block_size
            if self._num_readable(sequence) > 0:
                self.num_queried_tokens += len(sequence.token_ids)
                self.num_hit_tokens += sequence.num_cached_tokens
        sequence.num_named_blocks = num_found
        if not self._is_shared:
            return
        count = len(sequence.token_ids) // self._block_size
        for name in self._names(sequence, count)[num_found:count]:
            self._promises.setdefault(name, sequence)

    def name_computed(self, sequence: Sequence) -> None:
        """Name the blocks of a running sequence that submitted steps have filled by now.

        Only with tokens that are known: those in flight have no ids yet.
        """
        num_known = min(sequence.num_computed_tokens, len(sequence.token_ids))
        count = num_known // self._block_size
        if count <= sequence.num_named_blocks or not self._is_shared:
            return
        names = self._names(sequence, count)
        for index in range(sequence.num_named_blocks, count):
            self._pool.name(sequence.block_table[index], names[index])
            self._withdraw(names[index], sequence)
        sequence.num_named_blocks = count

    def note_end(self, sequence: Sequence) -> None:
        """A running sequence gives up its blocks: what it has not computed is not promised."""
        for name in sequence.block_hashes[sequence.num_named_blocks :]:
            self._withdraw(name, sequence)

    def _num_readable(self, sequence: Sequence) -> int:
        """Blocks that it may have from others: never the last known token's, and none where every
        prompt token has to be computed for its log-probability."""
        if not self._is_shared or sequence.sampling.num_prompt_logprobs is not None:
            return 0
        return (len(sequence.token_ids) - 1) // self._block_size

    def _withdraw(self, name: bytes, sequence: Sequence) -> None:
        if self._promises.get(name) is sequence:
            del self._promises[name]

    def _names(self, sequence: Sequence, count: int) -> list[bytes]:
        """Of its first blocks, at least `count`."""
        hashes = sequence.block_hashes
        if len(hashes) < count:
            root = root_hash(sequence.admission.cache_salt) if not hashes else b""
            extend_hashes(
                hashes, sequence.token_ids, block_size=self._block_size, count=count, root=root
            )
        return hashes

    def check_integrity(self) -> None:
        """Assert that promises are those of running sequences; for tests."""
        for sequence in self._promises.values():
            assert sequence.num_remaining_prefill > 0, "who computes no prompt has promised a block"
