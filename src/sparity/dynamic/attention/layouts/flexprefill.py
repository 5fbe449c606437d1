"""FlexPrefill: blocks, or columns and diagonals, for a share of attention (Lai et al. 2025, arXiv:2502.20766)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.attention.layouts.base import Blocks, Layout, by_head, diagonals, means, summed
from sparity.registry import register


@register("attention.layout", "flexprefill")
@dataclass(frozen=True)
class FlexPrefill(Layout):
    """Where pooled scores tell what the last block of queries pays, blocks by them; elsewhere columns and diagonals.

    Attributes:
        gamma: the share of attention that the chosen blocks are to have.
        tau: the root of the Jensen-Shannon divergence below which pooled scores are trusted.
        least: tokens that every query sees at least, by columns and by diagonals.
    """

    share: ClassVar[str] = "gamma"
    gamma: float = 0.9
    tau: float = 0.1
    least: int = 1024

    def choose(self, blocks: Blocks) -> Tensor:
        """See `Layout.choose`."""
        rows, columns = blocks.rows, blocks.columns
        if blocks.keys.shape[2] <= max(2 * max(blocks.size), self.least):
            return blocks.whole(blocks.causal)
        weights = blocks.last_weights(min(blocks.size[0], blocks.queries.shape[2]))
        vertical = weights.mean(-2)
        slash = diagonals(weights, blocks.keys.shape[2]) / weights.shape[-2]
        floor = -(-self.least // blocks.size[1])
        by_column = self._blocks_for(vertical, blocks.size[1], floor, columns)
        by_distance = self._blocks_for(slash, blocks.size[1], floor, columns)
        vertical, slash = summed(vertical, blocks.size[1]), summed(slash, blocks.size[1])
        keys = means(blocks.shared_keys, blocks.size[1])
        last = blocks.queries[:, :, -weights.shape[-2] :].float().mean(2, keepdim=True)
        pooled = ((last @ keys.transpose(-1, -2)) * blocks.scaling).softmax(-1)[:, :, 0]
        trusted = root_divergence(pooled, vertical) < self.tau  # [batch, heads]
        by_column = by_column.where(~trusted, floor)
        by_distance = by_distance.where(~trusted, floor)
        vertical[..., 0], slash[..., 0] = torch.inf, torch.inf
        chosen = _top(vertical, by_column)[:, :, None].expand(-1, -1, rows, -1)
        own = blocks.last_key // blocks.size[1]  # [rows], the block of each last query
        distance = (own[:, None] - torch.arange(columns, device=own.device)).clamp(0, columns - 1)
        chosen = chosen | _top(slash.flip(-1), by_distance).flip(-1)[..., distance]
        scores = means(blocks.queries, blocks.size[0]) @ keys.transpose(-1, -2) * blocks.scaling
        scores = scores.masked_fill(~blocks.causal, -torch.inf).softmax(-1).flatten(2)
        mass = scores.sort(dim=-1, descending=True, stable=True)
        inside = mass.values.double().cumsum(-1) <= by_head(self.gamma, scores) * rows
        pooled_choice = torch.zeros_like(inside).scatter(-1, mass.indices, inside).view(blocks.shape)
        chosen = chosen | (pooled_choice & trusted[..., None, None]) | blocks.diagonal
        return chosen & blocks.causal

    def _blocks_for(self, weights: Tensor, size: int, floor: int, most: int) -> Tensor:
        """How many blocks hold as many tokens as it takes for `gamma`, `[batch, heads]`."""
        reached = weights.sort(-1, descending=True).values.double().cumsum(-1)
        tokens = (reached <= by_head(self.gamma, reached)).sum(-1) + 1
        return (tokens // size + 1).clamp(min(floor, most), most)


def root_divergence(p: Tensor, q: Tensor) -> Tensor:
    """The root of the Jensen-Shannon divergence of distributions `[..., n]`, in nats; 0 log 0 is 0."""
    middle = (p + q) / 2
    halves = (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).nan_to_num(0.0)
    return (halves.sum(-1) / 2).clamp_min(0).sqrt()


def _top(weights: Tensor, counts: Tensor) -> Tensor:
    """The `counts` [...] highest of `weights` [..., n], bool like them; of equal ones the later."""
    ranks = weights.flip(-1).sort(dim=-1, descending=True, stable=True).indices.argsort(-1).flip(-1)
    return ranks < counts[..., None]
