"""CriticalKV: attention, then also what a value does to the output (Feng et al. 2025, arXiv:2502.03805)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.dynamic.cache.policies.base import best, highest, ranked
from sparity.dynamic.cache.policies.snapkv import SnapKV
from sparity.dynamic.cache.seen import Seen, cut
from sparity.registry import register


@register("cache.policy", "criticalkv")
@dataclass(frozen=True)
class CriticalKV(SnapKV):
    """Part of the budget goes by SnapKV's scores, the rest by (score + epsilon) times the size of the projected value.

    Attributes:
        first: the share of the budget that goes by attention alone.
        epsilon: what every token has at least.
    """

    first: float = 0.5
    epsilon: float = 1e-4

    @property
    def told(self) -> frozenset[str]:
        """See `Policy.told`."""
        return frozenset({"output_weight"})

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`: the second stage's."""
        return (super().score(seen) + self.epsilon) * projected_size(seen)

    def select(self, seen: Seen, budget: int, protected: Tensor) -> Tensor:
        """See `Policy.select`."""
        attended = super().score(seen)
        first = highest(ranked(attended, protected, seen.present), int(budget * self.first))
        scores = (attended + self.epsilon) * projected_size(seen)
        return best(scores, budget, protected | first, seen.present)


def projected_size(seen: Seen) -> Tensor:
    """The L1 norm of each value after its heads' part of the output projection, float32 `[batch, kv_heads, tokens]`.

    The mean over the query heads that share it; without the projection the norm of the value itself.
    """
    values = seen.values.float()
    if seen.output_weight is None:
        return values.abs().sum(-1)
    group = len(seen.output_weight) // values.shape[1]
    heads = cut(seen.output_weight.float(), 0, group)  # [kv_heads, group, width, hidden]
    sizes = [(values @ heads[:, member]).abs().sum(-1) for member in range(group)]
    return torch.stack(sizes).mean(0)
