"""vLLM's block pool with prefix caching: which KV blocks hold what, who uses them, and which is reused first.

A block that is full has a key, equal for equal contents up to its end. Blocks without a user are free, and those with a
key stay findable until they are reused, which happens in the order in which they were released; blocks without a key
are reused before all of them.
"""

from collections.abc import Sequence

Key = int | tuple[str, int]
"""Of a prompt's block: as the trace names it; of one that holds generated tokens: (request id, place)."""


class BlockCache:
    """The KV blocks of one engine."""

    __slots__ = ("_blank", "_holders", "_idle", "_keys", "_users")

    def __init__(self, blocks: int) -> None:
        self._blank = list(range(blocks))
        self._idle: dict[int, None] = {}
        """Free blocks with a key; the first is reused first."""
        self._keys: list[Key | None] = [None] * blocks
        self._users = [0] * blocks
        self._holders: dict[Key, dict[int, None]] = {}

    @property
    def free(self) -> int:
        """Blocks without a user."""
        return len(self._blank) + len(self._idle)

    def find(self, key: Key) -> int:
        """Return a block that holds this; -1 when there is none."""
        holders = self._holders.get(key)
        return -1 if holders is None else next(iter(holders))

    def idle(self, blocks: Sequence[int]) -> int:
        """Return how many of these are free: to share them takes them from the free ones."""
        return sum([self._users[block] == 0 for block in blocks])

    def share(self, blocks: Sequence[int]) -> None:
        """Add a user to found blocks."""
        for block in blocks:
            if not self._users[block]:
                del self._idle[block]
            self._users[block] += 1

    def take(self, count: int) -> list[int]:
        """Return free blocks for one user; what they held is forgotten."""
        taken = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block = next(iter(self._idle))
                del self._idle[block]
                self._forget(block)
            self._users[block] = 1
            taken.append(block)
        return taken

    def name(self, block: int, key: Key) -> None:
        """Say what a block holds, now that it is full."""
        if self._keys[block] is None:
            self._keys[block] = key
            self._holders.setdefault(key, {})[block] = None

    def release(self, blocks: Sequence[int]) -> None:
        """Take a user from a request's blocks; the last of them is reused first."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                if self._keys[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        self._keys[block] = None
        holders = self._holders[key]
        del holders[block]
        if not holders:
            del self._holders[key]
