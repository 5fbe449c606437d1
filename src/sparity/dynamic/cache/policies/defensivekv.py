"""DefensiveKV: the worst case over the observed queries in place of their mean (Feng et al. 2025, arXiv:2510.13334)."""

from dataclasses import dataclass

from torch import Tensor

from sparity.dynamic.cache.policies.adakv import AdaKV
from sparity.dynamic.cache.seen import Pooling, Seen, pooled, window_weights
from sparity.registry import register


@register("cache.policy", "defensivekv")
@dataclass(frozen=True)
class DefensiveKV(AdaKV):
    """A token's score is the largest weight that any observed query of any head gives it, at least their mean.

    Each query's weights are pooled on their own and keep their sum; heads share the budget as in Ada-KV.
    """

    kernel: int = 5
    pooling: Pooling = "avg"

    def observed(self, seen: Seen) -> Tensor:
        """See `SnapKV.observed`."""
        weights = window_weights(seen, self.window)
        smooth = pooled(weights, self.kernel, self.pooling)
        total = smooth.sum(-1, keepdim=True)
        smooth = smooth * (weights.sum(-1, keepdim=True) / total.where(total > 0, 1))
        worst = smooth.amax((2, 3))
        return worst if not worst.shape[-1] else worst.maximum(worst.mean(-1, keepdim=True))
