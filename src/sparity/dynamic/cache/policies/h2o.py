"""H2O: the tokens that were paid most attention, and the last ones (Zhang et al. 2023, arXiv:2306.14048)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.seen import Reduce, Seen, reduced
from sparity.registry import register


@register("cache.policy", "h2o")
@dataclass(frozen=True)
class H2O(Policy):
    """A token's score is the attention that all queries so far paid to it; half of the budget is for the last tokens.

    Attributes:
        recent: how many of the last tokens stay; None = half of the budget.
        group: how the query heads that share a key are taken together, `mean` or `max`.
        mean: divide a token's sum by the number of queries that saw it, so that early tokens have no advantage. This
            holds for one call; a run keeps sums.
    """

    recent: int | None = None
    group: Reduce = "mean"
    mean: bool = False
    accumulates: ClassVar[bool] = True
    evicts_while_decoding: ClassVar[bool] = True

    @property
    def declines(self) -> str | None:
        """See `Policy.declines`."""
        return "`mean` divides what one call paid, and a run keeps sums: leave it out" if self.mean else None

    def protected(self, budget: int) -> tuple[int, int]:
        """See `Policy.protected`."""
        return 0, budget // 2 if self.recent is None else self.recent

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`."""
        total = torch.zeros(seen.keys.shape[:3], device=seen.keys.device) if seen.mass is None else seen.mass.float()
        paid = torch.zeros_like(total)[:, :, None].repeat(1, 1, seen.queries.shape[1] // seen.keys.shape[1], 1)
        for weights in seen.blocks():
            paid += weights.sum(-2)
        total = total + reduced(paid, self.group, 2)
        if not self.mean:
            return total
        new, tokens = seen.queries.shape[2], seen.tokens
        return total / (tokens - torch.arange(tokens, device=total.device)).clamp_max(new)
