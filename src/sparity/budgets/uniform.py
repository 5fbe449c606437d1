"""Uniform: the same sparsity everywhere."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparity.budgets.base import Budget, Objective, Site
from sparity.registry import register


@register("budget", "uniform")
@dataclass(frozen=True)
class Uniform(Budget):
    """Every site gets the same sparsity."""

    def allocate(self, sites: Sequence[Site], sparsity: float, objective: Objective | None = None) -> dict[str, float]:
        """See `Budget.allocate`."""
        return {site.name: sparsity for site in sites}
