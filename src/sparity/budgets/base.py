"""What a budget is, and how fixed sparsities are set aside from it."""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from sparity.calibration import Statistics
from sparity.errors import InvalidInput

MOST = 0.999  # no site gives up everything


class Objective(Protocol):
    """Measures allocations: some sites give up their shares, the others are as they are."""

    def __call__(self, allocation: Mapping[str, float], samples: int | None = None) -> float:
        """The loss of the whole model, on the first `samples` calibration sequences; None is all."""

    def block_error(self, block: int, allocation: Mapping[str, float], error: str = "token") -> float:
        """How far the output of one block moves on the dense model's inputs: one of `quality.block_error`."""


@dataclass(frozen=True)
class Site:
    """Something that can give up a part of itself.

    `cost` is its size in parameters, `depth` the number of its block, `evidence` what the budget's own measurement
    found there, `bytes` what it takes when dense, `milliseconds` how long its product with one token takes at a share;
    it is asked for only when time is what counts. `mask` says whether a bit per weight tells what is left.
    """

    name: str
    cost: float
    depth: int = 0
    evidence: float = 0.0
    bytes: float = 0.0
    milliseconds: Callable[[float], float] | None = field(default=None, compare=False, repr=False)
    mask: bool = True

    @property
    def role(self) -> str:
        """What its name says in every block alike: the last part that is no number."""
        return next((part for part in reversed(self.name.split(".")) if not part.isdigit()), self.name)


class Budget(ABC):
    """How a sparsity is shared out among sites.

    A budget that rests on data names the statistics it `needs`, one that rests on weights alone `observes`: `observe`
    is then called for each block of the dense model, and what it finds comes back as the sites' evidence. One that
    `measures` is given an objective.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    observes: ClassVar[bool] = False
    measures: ClassVar[bool] = False

    @abstractmethod
    def allocate(self, sites: Sequence[Site], sparsity: float, objective: Objective | None = None) -> dict[str, float]:
        """The sparsity of each site; the mean, weighted by cost, is `sparsity`. `objective` measures an allocation."""

    def observe(self, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistics]) -> dict[str, float]:
        """The evidence of a block's sites: from their weights [out, in] and the statistics of their inputs, by name."""
        return {}

    def objective_of(self, given: Objective | None) -> Objective:
        """The objective, which a budget that measures cannot do without.

        Raises:
            InvalidInput: there is none.
        """
        if given is None:
            raise InvalidInput(f"budget {self.name} measures the loss of allocations: it needs an objective")
        return given


@dataclass(frozen=True)
class DepthLaw(Budget):
    """Sparsities that rise over depth from `first` in the first block to `last` in the last.

    Both ends are shifted together until the mean, weighted by size, is the sparsity asked for, so only their difference
    counts; sparsities stay within [0, 1).
    """

    first: float = 0.3
    last: float = 0.7

    def __post_init__(self) -> None:
        if not (0 <= self.first < 1 and 0 <= self.last < 1):
            raise InvalidInput(f"{self.name}: first {self.first} and last {self.last} must lie in [0, 1)")

    @abstractmethod
    def rise(self, depth: int, last: int) -> float:
        """How much of the way from first to last is done at `depth`: 0 in block 0, 1 in block `last` (at least 1)."""

    def allocate(self, sites: Sequence[Site], sparsity: float, objective: Objective | None = None) -> dict[str, float]:
        """See `Budget.allocate`."""
        last = max(site.depth for site in sites)
        rises = [self.rise(site.depth, last) if last else 0.0 for site in sites]
        return shift_to_sparsity(sites, [(self.last - self.first) * rise for rise in rises], sparsity)


@dataclass(frozen=True)
class SiteGroup:
    """Sites that get the same sparsity."""

    sites: tuple[Site, ...]

    @property
    def cost(self) -> float:
        """The cost of all of them."""
        return sum(site.cost for site in self.sites)

    def allocation(self, sparsity: float) -> dict[str, float]:
        """The same sparsity for each of them."""
        return dict.fromkeys((site.name for site in self.sites), sparsity)


@dataclass(frozen=True)
class MeasuredBudget(Budget):
    """Sparsities within `spread` of the one asked for, in multiples of `step`, by what they cost on the dense model.

    The loss is measured on `samples` calibration sequences. `per: block` lets the matrices of a block move together,
    `per: role` those of the same name in all blocks.
    """

    step: float = 0.1
    spread: float = 0.3
    samples: int = 8
    per: Literal["block", "role", "layer"] = "layer"

    measures: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.step <= self.spread <= 1:
            raise InvalidInput(
                f"{self.name}: step {self.step} and spread {self.spread} must fit 0 < step <= spread <= 1"
            )
        if self.samples < 1:
            raise InvalidInput(f"{self.name}: samples {self.samples}: measure on at least 1 sequence")

    def candidates(self, sparsity: float) -> list[float]:
        """The sparsities to try, ascending; the one asked for is among them."""
        count = int(self.spread / self.step + 1e-9)
        tried = (sparsity + number * self.step for number in range(-count, count + 1))
        return [min(max(each, 0.0), MOST) if each != sparsity else each for each in tried if -self.step < each < 1]

    def groups(self, sites: Sequence[Site]) -> list[SiteGroup]:
        """The sites that move together, in the order of their first."""
        key: dict[str, Callable[[Site], object]] = {
            "block": lambda site: site.depth,
            "role": lambda site: site.role,
            "layer": lambda site: site.name,
        }
        return grouped(sites, key[self.per])


def grouped(sites: Sequence[Site], key: Callable[[Site], object]) -> list[SiteGroup]:
    """The sites of each key together, in the order of their first."""
    members: dict[object, list[Site]] = {}
    for site in sites:
        members.setdefault(key(site), []).append(site)
    return [SiteGroup(tuple(found)) for found in members.values()]


def allocate(
    budget: Budget,
    sites: Sequence[Site],
    sparsity: float,
    fixed: Mapping[str, float],
    objective: Objective | None = None,
) -> dict[str, float]:
    """Sparsities for all sites: those of `fixed` (by name or glob), and the rest so that the mean is `sparsity`.

    The objective, where there is one, always sees the fixed sparsities too.

    Raises:
        InvalidInput: a glob that matches nothing, a sparsity outside [0, 1), or one that the rest cannot meet.
    """
    given: dict[str, float] = {}
    for pattern, chosen in fixed.items():
        if not 0 <= chosen < 1:
            raise InvalidInput(f"override {pattern}: sparsity {chosen} must lie in [0, 1)")
        matched = [site.name for site in sites if fnmatchcase(site.name, pattern)]
        if not matched:
            raise InvalidInput(f'override "{pattern}" matches no projection (one of them is {sites[0].name})')
        given.update(dict.fromkeys(matched, chosen))
    free = [site for site in sites if site.name not in given]
    total, free_cost = sum(site.cost for site in sites), sum(site.cost for site in free)
    spent = sum(site.cost * given[site.name] for site in sites if site.name in given)
    if not free:
        if abs(spent - sparsity * total) > 1e-9 * total:
            raise InvalidInput(
                f"the overrides fix every projection at a mean of {spent / total:.4f}, but sparsity is {sparsity}"
            )
        return given
    rest = (sparsity * total - spent) / free_cost
    if abs(rest) < 1e-12:
        rest = 0.0  # what rounding leaves of a sparsity that the overrides meet by themselves
    if not 0 <= rest < 1:
        raise InvalidInput(
            f"the overrides leave {free_cost / total:.1%} of the weights, which would need a sparsity of {rest:.3f} to "
            f"reach {sparsity} on average: change the overrides or the sparsity"
        )
    whole = None if objective is None else _WithFixed(objective, given)
    chosen_here = budget.allocate(free, rest, whole)
    return {site.name: given.get(site.name, chosen_here.get(site.name, 0.0)) for site in sites}


@dataclass(frozen=True)
class _WithFixed:
    """An objective that sees the fixed sparsities too."""

    objective: Objective
    given: Mapping[str, float]

    def __call__(self, allocation: Mapping[str, float], samples: int | None = None) -> float:
        return self.objective({**self.given, **allocation}, samples)

    def block_error(self, block: int, allocation: Mapping[str, float], error: str = "token") -> float:
        return self.objective.block_error(block, {**self.given, **allocation}, error)


def shift_to_sparsity(sites: Sequence[Site], shape: Sequence[float], sparsity: float) -> dict[str, float]:
    """Sparsities `shape + c`, clipped to [0, 0.999], with the `c` for which their mean is `sparsity`.

    The mean is weighted by cost. A sparsity above 0.999 is given to all alike.
    """
    if sparsity >= MOST or sparsity == 0:
        return dict.fromkeys((site.name for site in sites), sparsity)
    total = sum(site.cost for site in sites)

    def shifted(shift: float) -> list[float]:
        return [min(max(value + shift, 0.0), MOST) for value in shape]

    low, high = -max(shape), MOST - min(shape)
    for _ in range(200):  # halves the interval until its ends are neighbouring numbers
        middle = (low + high) / 2
        mean = sum(site.cost * each for site, each in zip(sites, shifted(middle), strict=True)) / total
        low, high = (middle, high) if mean < sparsity else (low, middle)
    return {site.name: each for site, each in zip(sites, shifted(high), strict=True)}


def scale_to_sparsity(sites: Sequence[Site], shape: Sequence[float], sparsity: float) -> dict[str, float]:
    """Sparsities `c * shape`, at most 0.999, with the `c` for which their mean, weighted by cost, is `sparsity`.

    A sparsity above 0.999 is given to all alike; `shape` is positive.
    """
    if sparsity >= MOST or sparsity == 0:
        return dict.fromkeys((site.name for site in sites), sparsity)
    costs, wanted = [site.cost for site in sites], sparsity * sum(site.cost for site in sites)
    full: set[int] = set()  # those that can give up no more
    while True:
        rest = sum(cost * value for i, (cost, value) in enumerate(zip(costs, shape, strict=True)) if i not in full)
        scale = (wanted - MOST * sum(costs[i] for i in full)) / rest
        over = {i for i, value in enumerate(shape) if i not in full and scale * value > MOST}
        if not over:
            return {s.name: MOST if i in full else scale * shape[i] for i, s in enumerate(sites)}
        full |= over


def no_worse_than_uniform(
    allocation: dict[str, float], sites: Sequence[Site], sparsity: float, objective: Objective
) -> dict[str, float]:
    """The allocation, or the same sparsity for all where that measures no worse."""
    uniform = dict.fromkeys((site.name for site in sites), sparsity)
    return allocation if objective(allocation) < objective(uniform) else uniform


def between(table: Mapping[float, float]) -> Callable[[float], float]:
    """Share -> value, on straight lines between those of a table, such as milliseconds; flat beyond its ends."""
    shares = sorted(table)

    def value(share: float) -> float:
        above = bisect_left(shares, share)
        if above in (0, len(shares)):
            return table[shares[min(above, len(shares) - 1)]]
        low, high = shares[above - 1], shares[above]
        return table[low] + (table[high] - table[low]) * (share - low) / (high - low)

    return value
