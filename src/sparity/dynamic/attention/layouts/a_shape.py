"""A-shape: the first tokens and the last ones before each query (Jiang et al. 2024, arXiv:2407.02490)."""

from dataclasses import dataclass

from torch import Tensor

from sparity.dynamic.attention.layouts.base import Blocks, Layout
from sparity.dynamic.attention.layouts.local import Local
from sparity.registry import register


@register("attention.layout", "a_shape")
@dataclass(frozen=True)
class AShape(Layout):
    """The blocks of the first `sinks` keys, and those of the last `window` tokens before each query.

    Attributes:
        sinks: tokens at the start.
        window: tokens before a query, its own counted.
    """

    sinks: int = 128
    window: int = 1024

    def choose(self, blocks: Blocks) -> Tensor:
        """See `Layout.choose`."""
        return Local(self.window).choose(blocks) | (blocks.causal & (blocks.key_starts < self.sinks))
