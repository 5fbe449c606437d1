"""Vertical-slash: columns and diagonals that the last queries see (MInference; Jiang et al. 2024, arXiv:2407.02490)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.dynamic.attention.layouts.base import Blocks, Layout, diagonals
from sparity.dynamic.cache.policies.base import highest
from sparity.registry import register


@register("attention.layout", "vertical_slash")
@dataclass(frozen=True)
class VerticalSlash(Layout):
    """Every block that holds one of the best columns or touches one of the best diagonals.

    Attributes:
        vertical: columns (keys), the first `sinks` among them.
        slash: diagonals (distances), the first `near` among them.
        last: queries that are observed.
        sinks: columns at the start that are always taken.
        near: distances from 0 on that are always taken.
    """

    vertical: int = 1000
    slash: int = 6096
    last: int = 64
    sinks: int = 30
    near: int = 100

    def choose(self, blocks: Blocks) -> Tensor:
        """See `Layout.choose`."""
        tokens = blocks.keys.shape[2]
        weights = blocks.last_weights(min(self.last, blocks.queries.shape[2]))
        column, slash = weights.sum(-2), diagonals(weights, tokens)
        column[..., : self.sinks] = torch.inf
        slash[..., : self.near] = torch.inf
        columns = highest(column, min(max(self.vertical, self.sinks), tokens))
        # of equal distances the nearer stays: counted from the far end it is the later
        slashes = highest(slash.flip(-1), min(max(self.slash, self.near), tokens)).flip(-1)
        return self._touched(blocks, columns, slashes) & blocks.causal

    def _touched(self, blocks: Blocks, columns: Tensor, slashes: Tensor) -> Tensor:
        """Blocks that hold a column, bool `[batch, heads, tokens]`, or touch a distance, likewise."""
        held = torch.zeros(blocks.shape, dtype=torch.bool, device=columns.device)
        ends = (blocks.key_starts + blocks.size[1]).clamp_max(columns.shape[-1])
        reached = _counted(columns)
        held |= (reached[..., ends] > reached[..., blocks.key_starts])[:, :, None]
        # distances in a block run from its last key and first query to its first key and last query
        least = (blocks.first_own[:, None] - (ends - 1)).clamp_min(0)
        most = blocks.last_key[:, None] - blocks.key_starts
        reached = _counted(slashes)
        inside = reached[..., (most + 1).clamp_min(0)] > reached[..., least]
        return held | (inside & (most >= 0))


def _counted(chosen: Tensor) -> Tensor:
    """bool `[..., n]` -> how many are True before each place, `[..., n + 1]`."""
    return torch.nn.functional.pad(chosen.int().cumsum(-1), (1, 0))
