"""Random: tokens drawn at random, the control that every policy must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.seen import Seen
from sparity.registry import register


@register("cache.policy", "random")
@dataclass(frozen=True)
class Random(Policy):
    """Scores are drawn uniformly, for each KV head its own; rows of a batch share them.

    Attributes:
        seed: of the draw.
    """

    seed: int = 0
    evicts_while_decoding: ClassVar[bool] = True

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`."""
        batch, heads, tokens = seen.keys.shape[:3]
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(tokens, heads, generator=generator).T  # a longer text begins with the same draws
        return drawn.to(seen.keys.device)[None].expand(batch, heads, tokens).contiguous()
