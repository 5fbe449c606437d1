"""Block greedy: inside each block, steps where they move its output least (TEAL, Liu et al. 2024, arXiv:2408.14690)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sparity.budgets.base import MOST, Budget, Objective, Site
from sparity.errors import InvalidInput
from sparity.registry import register

NOTHING = 1e-12  # of a block: less is left by rounding alone


@register("budget", "block_greedy")
@dataclass(frozen=True)
class BlockGreedy(Budget):
    """All blocks get the same sparsity; inside a block, sites rise from 0, each time the one that hurts least.

    A step takes the share `step` of the block's weights from one site, so small sites rise in large steps. Every site
    is tried at every step, on the block alone with the dense model's inputs, and the one with the least error of the
    block's output is kept; the last step is as small as what is left. A block keeps the uniform sparsity where that
    errs no more. The error is measured on `samples` calibration sequences; with `reference` as TEAL's code does, on
    the last quarter of the positions and with the norm taken over them.
    """

    step: float = 0.005
    samples: int = 8
    reference: bool = False

    measures: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise InvalidInput(f"{self.name}: step {self.step} must lie in (0, 1]")
        if self.samples < 1:
            raise InvalidInput(f"{self.name}: samples {self.samples}: measure on at least 1 sequence")

    def allocate(self, sites: Sequence[Site], sparsity: float, objective: Objective | None = None) -> dict[str, float]:
        """See `Budget.allocate`."""
        measure = self.objective_of(objective)
        found: dict[str, float] = {}
        for block in dict.fromkeys(site.depth for site in sites):
            found |= self._inside([site for site in sites if site.depth == block], sparsity, measure)
        return {site.name: found[site.name] for site in sites}

    def _inside(self, sites: Sequence[Site], sparsity: float, objective: Objective) -> dict[str, float]:
        """The sparsities of one block's sites."""
        uniform = dict.fromkeys((site.name for site in sites), sparsity)
        if sparsity == 0 or sparsity >= MOST or len(sites) == 1:
            return uniform

        def error(allocation: dict[str, float]) -> float:
            return objective.block_error(sites[0].depth, allocation, "teal" if self.reference else "token")

        allocation = dict.fromkeys(uniform, 0.0)
        total = sum(site.cost for site in sites)
        while (left := sparsity - sum(site.cost * allocation[site.name] for site in sites) / total) > NOTHING:
            weights = min(self.step, left) * total
            tried = [
                allocation | {site.name: min(allocation[site.name] + weights / site.cost, MOST)}
                for site in sites
                if allocation[site.name] < MOST
            ]
            allocation = min(tried, key=error)
        return allocation if error(allocation) < error(uniform) else uniform
