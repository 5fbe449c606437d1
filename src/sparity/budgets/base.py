"""What a budget is, and how fixed shares are set aside from it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import ClassVar

from sparity.errors import InvalidInput

Objective = Callable[[Mapping[str, float]], float]


class Budget(ABC):
    """How a target is shared out among sites."""

    name: ClassVar[str]

    @abstractmethod
    def allocate(
        self, sites: Sequence[str], target: float, cost: Mapping[str, float], objective: Objective | None = None
    ) -> dict[str, float]:
        """The fraction that each site gives up; the mean, weighted by `cost`, is `target`.

        `cost` is the size of a site in parameters, bytes or milliseconds; `objective` measures an allocation.
        """


def allocate(budget: Budget, cost: Mapping[str, float], target: float, fixed: Mapping[str, float]) -> dict[str, float]:
    """Fractions for all sites of `cost`: those of `fixed` (by site or glob), and the rest so that the mean is `target`.

    Raises:
        InvalidInput: a glob that matches nothing, a fraction outside [0, 1), or a target that the rest cannot meet.
    """
    given: dict[str, float] = {}
    for pattern, fraction in fixed.items():
        if not 0 <= fraction < 1:
            raise InvalidInput(f"override {pattern}: sparsity {fraction} must lie in [0, 1)")
        matched = [site for site in cost if fnmatchcase(site, pattern)]
        if not matched:
            raise InvalidInput(f'override "{pattern}" matches no projection (one of them is {next(iter(cost))})')
        given.update(dict.fromkeys(matched, fraction))
    open_sites = [site for site in cost if site not in given]
    total, open_cost = sum(cost.values()), sum(cost[site] for site in open_sites)
    spent = sum(cost[site] * fraction for site, fraction in given.items())
    if not open_sites:
        if abs(spent - target * total) > 1e-9 * total:
            raise InvalidInput(
                f"the overrides fix every projection at a mean of {spent / total:.4f}, but sparsity is {target}"
            )
        return given
    rest = (target * total - spent) / open_cost
    if not 0 <= rest < 1:
        raise InvalidInput(
            f"the overrides leave {open_cost / total:.1%} of the weights, which would need a sparsity of {rest:.3f} to "
            f"reach {target} on average: change the overrides or the target"
        )
    shares = budget.allocate(open_sites, rest, {site: cost[site] for site in open_sites})
    return {site: given.get(site, shares.get(site, 0.0)) for site in cost}
