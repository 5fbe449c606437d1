"""Linear depth: later blocks give up more, in equal steps."""

from dataclasses import dataclass

from sparity.budgets.base import DepthLaw
from sparity.registry import register


@register("budget", "linear_depth")
@dataclass(frozen=True)
class LinearDepth(DepthLaw):
    """Shares that follow an arithmetic progression over depth, from `first` to `last`.

    Both ends are shifted together until the mean, weighted by size, is the target, so only their difference counts;
    shares stay within [0, 1).
    """

    def rise(self, depth: int, last: int) -> float:
        """See `DepthLaw.rise`."""
        return depth / last
