"""How much of a new prompt an instance probably has in its prefix cache, as far as a decider away from it can know.

It remembers the prompts that it sent there, block by block, and forgets those asked for least recently once they are
more than the instance's KV cache holds: about what the instance does itself. A wrong guess costs time, never
correctness.
"""

from collections import OrderedDict
from collections.abc import Sequence

_UNKNOWN_CAPACITY_TOKENS = 1 << 18
_TOKEN_BYTES = 4


def block_ids(prompt: bytes, block_tokens: int, known: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the ids of a prompt's full blocks, for this process only.

    Args:
        prompt: token ids, four bytes each.
        block_tokens: length of a block.
        known: ids of its first blocks.
    """
    size = _TOKEN_BYTES * block_tokens
    ids = list(known)
    before = ids[-1] if ids else 0
    for start in range(size * len(ids), len(prompt) - size + 1, size):
        before = hash((before, prompt[start : start + size]))
        ids.append(before)
    return tuple(ids)


class PrefixIndex:
    """The blocks of prompt that one instance probably holds.

    A prompt is given as the ids of its blocks: two are equal if the prompts are equal up to the block's end.
    """

    __slots__ = ("_blocks", "_most", "block_tokens")

    def __init__(self, block_tokens: int, capacity_tokens: int = 0) -> None:
        """Start empty.

        Args:
            block_tokens: length of a block.
            capacity_tokens: what the instance's KV cache holds; 0: unknown.
        """
        self.block_tokens = block_tokens
        self._most = max((capacity_tokens or _UNKNOWN_CAPACITY_TOKENS) // block_tokens, 1)
        self._blocks: OrderedDict[int, None] = OrderedDict()
        """Least recently asked for first."""

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._blocks)

    def cached_tokens(self, blocks: Sequence[int], prompt_tokens: int) -> int:
        """Return how many tokens of a prompt need not be computed; the last one always is."""
        known = self._blocks
        found = 0
        for block in blocks[: (prompt_tokens - 1) // self.block_tokens]:
            if block not in known:
                break
            found += 1
        return found * self.block_tokens

    def add(self, blocks: Sequence[int], prompt_tokens: int) -> None:
        """Take note of a prompt that is computed there. Only full blocks count, and the last of them go first."""
        known = self._blocks
        for block in reversed(blocks[: prompt_tokens // self.block_tokens]):
            known[block] = None
            known.move_to_end(block)
        while len(known) > self._most:
            known.popitem(last=False)

    def discard(self, blocks: Sequence[int], cached_tokens: int) -> None:
        """Forget a prompt that left before it was computed, but for what was there before it came."""
        for block in blocks[cached_tokens // self.block_tokens :]:
            self._blocks.pop(block, None)
