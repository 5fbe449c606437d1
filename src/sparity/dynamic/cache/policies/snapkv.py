"""SnapKV: what the last queries of a prompt pay attention to (Li et al. 2024, arXiv:2404.14469)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.seen import Pooling, Reduce, Seen, pooled, reduced, window_weights, with_window
from sparity.registry import register


@register("cache.policy", "snapkv")
@dataclass(frozen=True)
class SnapKV(Policy):
    """A token's score is the mean weight that the last `window` queries give it, smoothed over its neighbours.

    Attributes:
        window: queries that are observed; their own tokens stay.
        kernel: tokens over which scores are pooled, an odd number.
        pooling: `avg` or `max`.
        group: how the query heads that share a key are taken together, `mean` or `max`.
    """

    window: int = 32
    kernel: int = 5
    pooling: Pooling = "avg"
    group: Reduce = "mean"
    by_head: ClassVar[bool] = True

    @property
    def least(self) -> int:
        """See `Policy.least`: a call that fills no window is kept as generated tokens are."""
        return self.window

    def protected(self, budget: int) -> tuple[int, int]:
        """See `Policy.protected`."""
        return 0, self.window

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`."""
        return with_window(self.observed(seen), seen.tokens)

    def observed(self, seen: Seen) -> Tensor:
        """The scores of the tokens before the window, float32 `[batch, kv_heads, tokens - window]`."""
        weights = reduced(window_weights(seen, self.window).mean(-2), self.group, 2)
        return pooled(weights, self.kernel, self.pooling)
