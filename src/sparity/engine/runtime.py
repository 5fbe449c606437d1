"""What the compiled step asks of a layer of a key-value cache, however that layer keeps its tokens."""

from abc import abstractmethod
from typing import NamedTuple

from sparity.engine.kernels.step.cpu import CacheView


class CacheShape(NamedTuple):
    """What a model appends to one layer of a cache: sequences, key and value heads, and the size of a head."""

    rows: int
    kv_heads: int
    width: int


class CacheLayer:
    """One layer of a cache that the library writes: `view`, then the step, then `commit`.

    A layer of transformers that is one too takes part in decoding on the fast path; its tokens are bfloat16.
    """

    @abstractmethod
    def declines(self, shape: CacheShape, length: int) -> str | None:
        """Why a step cannot go on from what the layer holds, or None when it can.

        Args:
            shape: what the model appends.
            length: the tokens that came before, as the first layer counts them.
        """

    @abstractmethod
    def view(self, fresh: int, shape: CacheShape) -> CacheView:
        """Where the library reads and writes, with room for `fresh` more tokens of every row."""

    @abstractmethod
    def commit(self, fresh: int) -> None:
        """Hold the `fresh` tokens of every row that were written where the last `view` said."""

    @abstractmethod
    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back; their number is negative, as transformers gives it."""
