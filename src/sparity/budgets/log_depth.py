"""Log depth: later blocks give up more, rising fast at first and slowly later."""

import math
from dataclasses import dataclass

from sparity.budgets.base import DepthLaw
from sparity.registry import register


@register("budget", "log_depth")
@dataclass(frozen=True)
class LogDepth(DepthLaw):
    """Shares that follow a logarithm over depth, from `first` to `last`.

    Both ends are shifted together until the mean, weighted by size, is the sparsity asked for, so only their
    difference counts; sparsities stay within [0, 1).
    """

    def rise(self, depth: int, last: int) -> float:
        """See `DepthLaw.rise`."""
        return math.log(depth + 1) / math.log(last + 1)
