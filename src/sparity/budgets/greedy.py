"""Greedy: the next step always where it costs least, measured."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from sparity.budgets.base import MeasuredBudget, Objective, Site, SiteGroup, no_worse_than_uniform, shift_to_target
from sparity.registry import register


@register("budget", "greedy")
@dataclass(frozen=True)
class Greedy(MeasuredBudget):
    """Start `spread` below the target; raise by `step` whichever site adds the least loss per weight; repeat.

    Every candidate is measured together with all steps taken before it. A site's last measurement stands in for a new
    one until the site is the cheapest: losses grow with sparsity, so few are measured again. The result is at least as
    good as the uniform budget on the sequences it was measured on. The loss is measured on `samples` calibration
    sequences. `per: block` lets the matrices of a block move together.
    """

    def allocate(self, sites: Sequence[Site], target: float, objective: Objective | None = None) -> dict[str, float]:
        """See `Budget.allocate`."""
        measure, groups, levels = self.objective_of(objective), self.groups(sites), self.levels(target)
        if target == 0 or len(groups) == 1:
            return dict.fromkeys((site.name for site in sites), target)
        reached = dict.fromkeys(range(len(groups)), 0)  # group -> its place in `levels`
        shares = {site.name: levels[0] for site in sites}
        goal = target * sum(site.cost for site in sites)
        loss = measure(shares)

        def price(index: int) -> tuple[float, float]:
            """Added loss per weight of the group's next step, and the loss then."""
            group, place = groups[index], reached[index]
            then = measure(shares | group.shares(levels[place + 1]))
            return (then - loss) / (group.cost * (levels[place + 1] - levels[place])), then

        prices = [(float("-inf"), index, float("nan")) for index in range(len(groups))]  # each is measured when popped
        heapq.heapify(prices)
        while prices and _given_up(groups, shares) < goal:
            _, index, _ = heapq.heappop(prices)
            found, then = price(index)
            if prices and found > prices[0][0]:
                heapq.heappush(prices, (found, index, then))
                continue
            reached[index] += 1
            shares |= groups[index].shares(levels[reached[index]])
            loss = then
            if reached[index] + 1 < len(levels):
                heapq.heappush(prices, (found, index, then))
        exact = shift_to_target(sites, [shares[site.name] for site in sites], target)
        return no_worse_than_uniform(exact, sites, target, measure)


def _given_up(groups: Sequence[SiteGroup], shares: dict[str, float]) -> float:
    return sum(site.cost * shares[site.name] for group in groups for site in group.sites)
