"""Keys and values of texts that were read before, in blocks, for texts that begin alike.

A block holds what a token's keys and values are when nothing was evicted: a function of the tokens up to it, and of
nothing else. So what is found here is, bit for bit, what would be computed. The blocks that were used longest ago go.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

from sparity.serve.execution.base import Execution

BLOCK = 64  # tokens


class Prefixes:
    """Blocks of one execution.

    Args:
        execution: which gives them and takes them.
        limit: bytes that they may take.

    Attributes:
        held: bytes that they take.
    """

    def __init__(self, execution: Execution, limit: int) -> None:
        self._execution, self._limit = execution, limit
        self._bytes = execution.block_bytes(BLOCK)
        self._blocks: OrderedDict[bytes, Any] = OrderedDict()

    @property
    def held(self) -> int:
        """See the class."""
        return len(self._blocks) * self._bytes

    def restore(self, slot: int, ids: Sequence[int], most: int) -> int:
        """Write what is known of the first `most` tokens of `ids` into an empty slot -> how many tokens that are."""
        done = 0
        for key in _keys(ids[:most]):
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            self._execution.write(slot, done, self._blocks[key])
            done += BLOCK
        return done

    def keep(self, slot: int, ids: Sequence[int], most: int) -> None:
        """Copy the whole blocks among the first `most` tokens of a slot that holds `ids`."""
        for index, key in enumerate(_keys(ids[:most])):
            if key not in self._blocks:
                while self._blocks and self.held + self._bytes > self._limit:
                    self._blocks.popitem(last=False)
                if self._bytes > self._limit:
                    return
                self._blocks[key] = self._execution.read(slot, index * BLOCK, (index + 1) * BLOCK)
            self._blocks.move_to_end(key)


def _keys(ids: Sequence[int]) -> Iterator[bytes]:
    """A name of each whole block, which stands for all tokens up to its end."""
    key = b""
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        numbers = b"".join(token.to_bytes(4, "little") for token in ids[start : start + BLOCK])
        key = blake2b(key + numbers, digest_size=32).digest()
        yield key
