"""Strided: the last tokens, and every so many tokens before them (Child et al. 2019, arXiv:1904.10509)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.dynamic.attention.layouts.base import Blocks, Layout
from sparity.registry import register


@register("attention.layout", "strided")
@dataclass(frozen=True)
class Strided(Layout):
    """Every `every`-th block of keys, counted from the first, and those less than `every` blocks behind a query's own.

    Attributes:
        every: blocks of keys.
    """

    every: int = 4

    def choose(self, blocks: Blocks) -> Tensor:
        """See `Layout.choose`."""
        columns = torch.arange(blocks.columns, device=blocks.keys.device)
        near = blocks.key_starts > blocks.last_key[:, None] - self.every * blocks.size[1]
        return blocks.whole(blocks.causal & (near | (columns % self.every == 0) | blocks.diagonal))
