"""Random: blocks drawn at random (Zaheer et al. 2020, arXiv:2007.14062), the control that every layout must beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.dynamic.attention.layouts.base import Blocks, Layout
from sparity.dynamic.cache.policies.base import highest
from sparity.registry import register


@register("attention.layout", "random")
@dataclass(frozen=True)
class Random(Layout):
    """Each block of queries draws `count` of the blocks of keys before its own, each head its own, and has its own.

    Attributes:
        count: blocks of keys.
        seed: of the draw.
    """

    count: int = 3
    seed: int = 0

    def choose(self, blocks: Blocks) -> Tensor:
        """See `Layout.choose`."""
        _, heads, rows, columns = blocks.shape
        drawn = torch.rand(heads, rows, columns, generator=torch.Generator().manual_seed(self.seed))
        free = blocks.causal & ~blocks.diagonal
        order = drawn.to(free.device).masked_fill(~free, -1.0)
        return blocks.whole(((highest(order, self.count) & free) | blocks.diagonal)[None])
