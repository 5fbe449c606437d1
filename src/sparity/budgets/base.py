"""What a budget is, and how fixed shares are set aside from it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from torch import Tensor

from sparity.calibration import Statistics
from sparity.errors import InvalidInput

Objective = Callable[[Mapping[str, float]], float]
MOST = 0.999  # no site gives up everything


@dataclass(frozen=True)
class Site:
    """Something that can give up a fraction of itself.

    `cost` is its size in parameters, bytes or milliseconds, `depth` the number of its block, `evidence` what the
    budget's own measurement found there, `bytes` what it takes when dense.
    """

    name: str
    cost: float
    depth: int = 0
    evidence: float = 0.0
    bytes: float = 0.0


class Budget(ABC):
    """How a target is shared out among sites.

    A budget that rests on data names the statistics it `needs`; `observe` is then called for each block of the dense
    model, and what it finds comes back as the sites' evidence. One that `measures` is given an objective.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    measures: ClassVar[bool] = False

    @abstractmethod
    def allocate(self, sites: Sequence[Site], target: float, objective: Objective | None = None) -> dict[str, float]:
        """The fraction that each site gives up; the mean, weighted by cost, is `target`. `objective` measures one."""

    def observe(self, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistics]) -> dict[str, float]:
        """The evidence of a block's sites: from their weights [out, in] and the statistics of their inputs, by name."""
        return {}


@dataclass(frozen=True)
class DepthLaw(Budget):
    """Shares that rise over depth from `first` in the first block to `last` in the last.

    Both ends are shifted together until the mean, weighted by size, is the target, so only their difference counts;
    shares stay within [0, 1).
    """

    first: float = 0.3
    last: float = 0.7

    def __post_init__(self) -> None:
        if not (0 <= self.first < 1 and 0 <= self.last < 1):
            raise InvalidInput(f"{self.name}: first {self.first} and last {self.last} must lie in [0, 1)")

    @abstractmethod
    def rise(self, depth: int, last: int) -> float:
        """How much of the way from first to last is done at `depth`: 0 in block 0, 1 in block `last` (at least 1)."""

    def allocate(self, sites: Sequence[Site], target: float, objective: Objective | None = None) -> dict[str, float]:
        """See `Budget.allocate`."""
        last = max(site.depth for site in sites)
        rises = [self.rise(site.depth, last) if last else 0.0 for site in sites]
        return shift_to_target(sites, [(self.last - self.first) * rise for rise in rises], target)


@dataclass(frozen=True)
class SiteGroup:
    """Sites that give up the same fraction."""

    sites: tuple[Site, ...]

    @property
    def cost(self) -> float:
        """The cost of all of them."""
        return sum(site.cost for site in self.sites)

    def shares(self, fraction: float) -> dict[str, float]:
        """The same fraction for each of them."""
        return dict.fromkeys((site.name for site in self.sites), fraction)


@dataclass(frozen=True)
class MeasuredBudget(Budget):
    """Shares within `spread` of the target, in multiples of `step` from it, by what they cost on the dense model.

    The loss is measured on `samples` calibration sequences. `per: block` lets the matrices of a block move together.
    """

    step: float = 0.1
    spread: float = 0.3
    samples: int = 8
    per: Literal["block", "layer"] = "layer"

    measures: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.step <= self.spread <= 1:
            raise InvalidInput(
                f"{self.name}: step {self.step} and spread {self.spread} must fit 0 < step <= spread <= 1"
            )
        if self.samples < 1:
            raise InvalidInput(f"{self.name}: samples {self.samples}: measure on at least 1 sequence")

    def levels(self, target: float) -> list[float]:
        """The fractions to try, ascending; the target is one of them."""
        count = int(self.spread / self.step + 1e-9)
        tried = (target + number * self.step for number in range(-count, count + 1))
        return [min(max(level, 0.0), MOST) if level != target else level for level in tried if -self.step < level < 1]

    def groups(self, sites: Sequence[Site]) -> list[SiteGroup]:
        """The sites that move together, in the order of their first."""
        members: dict[object, list[Site]] = {}
        for site in sites:
            members.setdefault(site.depth if self.per == "block" else site.name, []).append(site)
        return [SiteGroup(tuple(found)) for found in members.values()]

    def objective_of(self, given: Objective | None) -> Objective:
        """The objective, which these budgets cannot do without.

        Raises:
            InvalidInput: there is none.
        """
        if given is None:
            raise InvalidInput(f"budget {self.name} measures the loss of allocations: it needs an objective")
        return given


def allocate(
    budget: Budget,
    sites: Sequence[Site],
    target: float,
    fixed: Mapping[str, float],
    objective: Objective | None = None,
) -> dict[str, float]:
    """Fractions for all sites: those of `fixed` (by name or glob), and the rest so that the mean is `target`.

    The objective, where there is one, always sees the fixed fractions too.

    Raises:
        InvalidInput: a glob that matches nothing, a fraction outside [0, 1), or a target that the rest cannot meet.
    """
    given: dict[str, float] = {}
    for pattern, fraction in fixed.items():
        if not 0 <= fraction < 1:
            raise InvalidInput(f"override {pattern}: sparsity {fraction} must lie in [0, 1)")
        matched = [site.name for site in sites if fnmatchcase(site.name, pattern)]
        if not matched:
            raise InvalidInput(f'override "{pattern}" matches no projection (one of them is {sites[0].name})')
        given.update(dict.fromkeys(matched, fraction))
    free = [site for site in sites if site.name not in given]
    total, free_cost = sum(site.cost for site in sites), sum(site.cost for site in free)
    spent = sum(site.cost * given[site.name] for site in sites if site.name in given)
    if not free:
        if abs(spent - target * total) > 1e-9 * total:
            raise InvalidInput(
                f"the overrides fix every projection at a mean of {spent / total:.4f}, but sparsity is {target}"
            )
        return given
    rest = (target * total - spent) / free_cost
    if abs(rest) < 1e-12:
        rest = 0.0  # what rounding leaves of a target that the overrides meet by themselves
    if not 0 <= rest < 1:
        raise InvalidInput(
            f"the overrides leave {free_cost / total:.1%} of the weights, which would need a sparsity of {rest:.3f} to "
            f"reach {target} on average: change the overrides or the target"
        )
    whole = None if objective is None else lambda shares: objective({**given, **shares})
    shares = budget.allocate(free, rest, whole)
    return {site.name: given.get(site.name, shares.get(site.name, 0.0)) for site in sites}


def shift_to_target(sites: Sequence[Site], shape: Sequence[float], target: float) -> dict[str, float]:
    """Fractions `shape + c`, clipped to [0, 0.999], with the `c` for which their mean is `target`.

    The mean is weighted by cost. A target above 0.999 is given to all alike.
    """
    if target >= MOST or target == 0:
        return dict.fromkeys((site.name for site in sites), target)
    total = sum(site.cost for site in sites)

    def shares(shift: float) -> list[float]:
        return [min(max(value + shift, 0.0), MOST) for value in shape]

    low, high = -max(shape), MOST - min(shape)
    for _ in range(200):  # halves the interval until its ends are neighbouring numbers
        middle = (low + high) / 2
        mean = sum(site.cost * share for site, share in zip(sites, shares(middle), strict=True)) / total
        low, high = (middle, high) if mean < target else (low, middle)
    return {site.name: share for site, share in zip(sites, shares(high), strict=True)}


def no_worse_than_uniform(
    shares: dict[str, float], sites: Sequence[Site], target: float, objective: Objective
) -> dict[str, float]:
    """The shares, or the target for all where that measures no worse."""
    uniform = dict.fromkeys((site.name for site in sites), target)
    return shares if objective(shares) < objective(uniform) else uniform
