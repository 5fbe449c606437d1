"""SpargeAttn: blocks by their means, where blocks are alike in themselves (Zhang et al. 2025, arXiv:2502.18137)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparity.dynamic.attention.layouts.base import Blocks, Layout, by_head, means, summed
from sparity.registry import register


@register("attention.layout", "spargeattn")
@dataclass(frozen=True)
class SpargeAttn(Layout):
    """The highest blocks of a softmax over block means, up to a share; blocks unlike in themselves are all computed.

    Attributes:
        similarity: mean cosine of a block's tokens above which its mean stands for it.
        threshold: the share, of the blocks that do.
        sinks: tokens at the start whose blocks are computed whatever the means say, 0 in the authors' code.
        reference: leave also the blocks of a query's own token to the threshold, as the authors' code does.
    """

    share: ClassVar[str] = "threshold"
    similarity: float = 0.6
    threshold: float = 0.98
    sinks: int = 0
    reference: bool = False

    def choose(self, blocks: Blocks) -> Tensor:
        """See `Layout.choose`."""
        group = blocks.queries.shape[1] // blocks.keys.shape[1]
        queries, keys = means(blocks.queries, blocks.size[0]), means(blocks.keys, blocks.size[1])
        alike = likeness(blocks.queries, blocks.size[0]) > self.similarity  # [batch, heads, rows]
        alike_keys = likeness(blocks.keys, blocks.size[1]) > self.similarity
        keys, alike_keys = keys.repeat_interleave(group, 1), alike_keys.repeat_interleave(group, 1)[:, :, None]
        scores = queries @ keys.transpose(-1, -2) * blocks.scaling
        counted = alike_keys & blocks.causal
        weights = scores.masked_fill(~counted, -torch.inf).softmax(-1).nan_to_num()
        chosen = leading(weights, self.threshold) & counted
        chosen = chosen | ~alike_keys | ~alike[..., None]
        chosen = chosen | (blocks.key_starts < self.sinks)
        if not self.reference:
            chosen = chosen | blocks.diagonal
        return chosen & blocks.causal


def likeness(x: Tensor, size: int) -> Tensor:
    """The mean cosine of all pairs of tokens of each block, itself included, `[batch, heads, blocks]`."""
    total = summed(normalize(x.float(), dim=-1).transpose(-1, -2), size)  # [batch, heads, width, blocks]
    counts = summed(x.new_ones(x.shape[2]).float(), size)
    return total.square().sum(2) / counts.square()


def leading(weights: Tensor, share: float | Tensor) -> Tensor:
    """The highest `weights` [batch, heads, ..., n] whose sum is at most a share, one at least; bool like them."""
    found = weights.double().sort(dim=-1, descending=True, stable=True)
    inside = found.values.cumsum(-1) <= by_head(share, weights)
    inside[..., 0] = True
    return torch.zeros_like(inside).scatter(-1, found.indices, inside)
