"""Linear depth: later blocks give up more, in equal steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparity.budgets.base import Budget, Objective, Site, shift_to_target
from sparity.errors import InvalidInput
from sparity.registry import register


@register("budget", "linear_depth")
@dataclass(frozen=True)
class LinearDepth(Budget):
    """Shares that follow an arithmetic progression over depth, from `first` in the first block to `last` in the last.

    Both ends are shifted together until the mean, weighted by size, is the target, so only their difference counts;
    shares stay within [0, 1).
    """

    first: float = 0.3
    last: float = 0.7

    def __post_init__(self) -> None:
        if not (0 <= self.first < 1 and 0 <= self.last < 1):
            raise InvalidInput(f"linear_depth: first {self.first} and last {self.last} must lie in [0, 1)")

    def allocate(self, sites: Sequence[Site], target: float, objective: Objective | None = None) -> dict[str, float]:
        """See `Budget.allocate`."""
        last = max(site.depth for site in sites)
        rises = [site.depth / last if last else 0.0 for site in sites]
        return shift_to_target(sites, [(self.last - self.first) * rise for rise in rises], target)
