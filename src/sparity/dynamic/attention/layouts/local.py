"""Local: the last tokens before each query (sliding window; Child et al. 2019, arXiv:1904.10509)."""

from dataclasses import dataclass

from torch import Tensor

from sparity.dynamic.attention.layouts.base import Blocks, Layout
from sparity.registry import register


@register("attention.layout", "local")
@dataclass(frozen=True)
class Local(Layout):
    """Blocks in which some query is less than `window` tokens behind some key.

    Attributes:
        window: tokens, a query's own counted.
    """

    window: int = 1024

    def choose(self, blocks: Blocks) -> Tensor:
        """See `Layout.choose`."""
        ends = blocks.key_starts + blocks.size[1]
        return blocks.whole(blocks.causal & (ends > blocks.first_own[:, None] - self.window + 1))
