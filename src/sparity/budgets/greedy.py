"""Greedy: the next step always where it costs least, measured."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from sparity.budgets.base import MeasuredBudget, Objective, Site, SiteGroup, no_worse_than_uniform, shift_to_sparsity
from sparity.registry import register


@register("budget", "greedy")
@dataclass(frozen=True)
class Greedy(MeasuredBudget):
    """Start `spread` below what is asked for; raise by `step` whichever site adds the least loss per weight; repeat.

    Every candidate is measured together with all steps taken before it. A site's last measurement stands in for a new
    one until the site is the cheapest: losses grow with sparsity, so few are measured again. The result is at least as
    good as the uniform budget on the sequences it was measured on. The loss is measured on `samples` calibration
    sequences. `per: block` lets the matrices of a block move together, `per: role` those of the same name in all
    blocks.
    """

    def allocate(self, sites: Sequence[Site], sparsity: float, objective: Objective | None = None) -> dict[str, float]:
        """See `Budget.allocate`."""
        measure, groups, candidates = self.objective_of(objective), self.groups(sites), self.candidates(sparsity)
        if sparsity == 0 or len(groups) == 1:
            return dict.fromkeys((site.name for site in sites), sparsity)
        reached = dict.fromkeys(range(len(groups)), 0)  # group -> its place in `candidates`
        allocation = {site.name: candidates[0] for site in sites}
        goal = sparsity * sum(site.cost for site in sites)
        loss = measure(allocation)

        def price(index: int) -> tuple[float, float]:
            """Added loss per weight of the group's next step, and the loss then."""
            group, place = groups[index], reached[index]
            then = measure(allocation | group.allocation(candidates[place + 1]))
            return (then - loss) / (group.cost * (candidates[place + 1] - candidates[place])), then

        prices = [(float("-inf"), index, float("nan")) for index in range(len(groups))]  # each is measured when popped
        heapq.heapify(prices)
        while prices and _given_up(groups, allocation) < goal:
            _, index, _ = heapq.heappop(prices)
            found, then = price(index)
            if prices and found > prices[0][0]:
                heapq.heappush(prices, (found, index, then))
                continue
            reached[index] += 1
            allocation |= groups[index].allocation(candidates[reached[index]])
            loss = then
            if reached[index] + 1 < len(candidates):
                heapq.heappush(prices, (found, index, then))
        exact = shift_to_sparsity(sites, [allocation[site.name] for site in sites], sparsity)
        return no_worse_than_uniform(exact, sites, sparsity, measure)


def _given_up(groups: Sequence[SiteGroup], allocation: dict[str, float]) -> float:
    return sum(site.cost * allocation[site.name] for group in groups for site in group.sites)
