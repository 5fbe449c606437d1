"""ATP: an arithmetic progression over depth, its step found by trying (Huang et al. 2025, arXiv:2502.14770)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sparity.budgets.base import MOST, Budget, Objective, Site, no_worse_than_uniform, shift_to_sparsity
from sparity.errors import InvalidInput
from sparity.registry import register


@register("budget", "atp")
@dataclass(frozen=True)
class ATP(Budget):
    """Later blocks give up more, by the same step from each to the next.

    The step is one of `tries` at equal distances, from 0 to the largest for which the first block gives up 0 or more
    and the last one 1 or less: the one whose loss is least on `samples` calibration sequences. 0 is uniform.
    """

    tries: int = 9
    samples: int = 8

    measures: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tries < 2 or self.samples < 1:
            raise InvalidInput(f"atp: tries {self.tries} must be 2 or more, and samples {self.samples} 1 or more")

    def allocate(self, sites: Sequence[Site], sparsity: float, objective: Objective | None = None) -> dict[str, float]:
        """See `Budget.allocate`."""
        last, measure = max(site.depth for site in sites), self.objective_of(objective)
        uniform = dict.fromkeys((site.name for site in sites), sparsity)
        if not last or sparsity == 0 or sparsity >= MOST:
            return uniform
        steepest = 2 * min(sparsity, MOST - sparsity) / last
        steps = [steepest * number / (self.tries - 1) for number in range(1, self.tries)]
        found = [shift_to_sparsity(sites, [step * site.depth for site in sites], sparsity) for step in steps]
        best = min(found, key=lambda tried: measure(tried, self.samples))
        return no_worse_than_uniform(best, sites, sparsity, measure)
