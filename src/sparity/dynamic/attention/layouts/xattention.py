"""XAttention: blocks by sums along antidiagonals (Xu et al. 2025, arXiv:2503.16428)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparity.dynamic.attention.layouts.base import Blocks, Layout, covering, summed
from sparity.dynamic.cache.seen import cut
from sparity.registry import register


@register("attention.layout", "xattention")
@dataclass(frozen=True)
class XAttention(Layout):
    """The fewest blocks whose share of a coarse attention is a threshold; first the first block and each query's own.

    Within a tile of `stride` by `stride`, query i meets key `stride - 1 - i`: each token is met once.

    Attributes:
        stride: side of a tile, which blocks must be multiples of.
        threshold: the share.
    """

    share: ClassVar[str] = "threshold"
    stride: int = 8
    threshold: float = 0.9

    def choose(self, blocks: Blocks) -> Tensor:
        """See `Layout.choose`."""
        weights = self._coarse(blocks)  # [batch, heads, tiles of queries, tiles of keys]
        mass = summed(weights, blocks.size[1] // self.stride)
        mass = summed(mass.transpose(-1, -2), blocks.size[0] // self.stride).transpose(-1, -2)
        first = torch.zeros_like(blocks.causal)
        first[:, 0] = True
        return covering(mass.masked_fill(~blocks.causal, 0), self.threshold, blocks.diagonal | first) & blocks.causal

    def _coarse(self, blocks: Blocks) -> Tensor:
        """The coarse attention, float32; tiles that only padding fills pay and are paid nothing."""
        stride, before = self.stride, blocks.before
        queries, keys = blocks.queries.float(), blocks.shared_keys
        new, tokens = queries.shape[2], keys.shape[2]
        queries = cut(pad(queries, (0, 0, 0, -new % stride)), 2, stride).flip(3).flatten(3)
        keys = cut(pad(keys, (0, 0, 0, -tokens % stride)), 2, stride).flatten(3)
        products = queries @ keys.transpose(-1, -2) * (blocks.scaling / stride)
        own = (torch.arange(queries.shape[2], device=keys.device) * stride + before) // stride
        hidden = torch.arange(keys.shape[2], device=keys.device) > own[:, None]
        weights: Tensor = products.masked_fill(hidden, -torch.inf).softmax(-1)
        return weights
