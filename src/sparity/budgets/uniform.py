"""Uniform: the same fraction everywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparity.budgets.base import Budget, Objective
from sparity.registry import register


@register("budget", "uniform")
@dataclass(frozen=True)
class Uniform(Budget):
    """Every site gives up the target fraction."""

    def allocate(
        self, sites: Sequence[str], target: float, cost: Mapping[str, float], objective: Objective | None = None
    ) -> dict[str, float]:
        """See `Budget.allocate`."""
        return dict.fromkeys(sites, target)
