"""Ada-KV: the heads of a layer share one budget (Feng et al. 2024, arXiv:2407.11550)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.cache.policies.base import highest, ranked
from sparity.dynamic.cache.policies.snapkv import SnapKV
from sparity.dynamic.cache.seen import Pooling, Seen
from sparity.registry import register


@register("cache.policy", "adakv")
@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV's scores, and the highest of all heads together stay; every head keeps a share of the budget at least.

    Attributes:
        floor: that share.
    """

    kernel: int = 7
    pooling: Pooling = "max"
    floor: float = 0.2
    ragged: ClassVar[bool] = True
    by_head: ClassVar[bool] = False

    def select(self, seen: Seen, budget: int, protected: Tensor) -> Tensor:
        """See `Policy.select`."""
        return shared(self.score(seen), budget, protected, seen.present, self.floor)


def shared(scores: Tensor, budget: int, protected: Tensor, present: Tensor | None, floor: float) -> Tensor:
    """The `budget` per head that all heads share: the highest of each up to the floor, then the highest of all."""
    order = ranked(scores, protected, present)
    safe = highest(order, int(budget * floor)) & (order > -torch.inf)
    order = order.masked_fill(safe, torch.inf)
    batch, heads, tokens = order.shape
    # of equal scores the later token stays, whichever head it is of
    flat = highest(order.transpose(1, 2).reshape(batch, tokens * heads), budget * heads)
    found = flat.view(batch, tokens, heads).transpose(1, 2)
    return found if present is None else found & present
