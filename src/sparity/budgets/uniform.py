"""Uniform: the same fraction everywhere."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparity.budgets.base import Budget, Objective, Site
from sparity.registry import register


@register("budget", "uniform")
@dataclass(frozen=True)
class Uniform(Budget):
    """Every site gives up the target fraction."""

    def allocate(self, sites: Sequence[Site], target: float, objective: Objective | None = None) -> dict[str, float]:
        """See `Budget.allocate`."""
        return {site.name: target for site in sites}
