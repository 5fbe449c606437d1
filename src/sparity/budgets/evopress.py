"""EvoPress: an allocation bred by small exchanges (Sieberling et al. 2025, arXiv:2410.14649)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sparity.budgets.base import MOST, MeasuredBudget, Objective, Site, SiteGroup
from sparity.errors import InvalidInput, NumericalError
from sparity.registry import register

FLIPS = 3  # the most exchanges between parent and child
FEWER = 4  # times fewer sequences in a round of selection than in the next
TRIES = 4  # per child, for one that is new
ROUNDING = 1e-9  # of a level

Levels = tuple[int, ...]  # of each group, 0 being the sparsity asked for


@register("budget", "evopress")
@dataclass(frozen=True)
class EvoPress(MeasuredBudget):
    """The uniform sparsity, changed in small exchanges, of which the best one in a generation replaces its parent.

    A level is the same number of weights everywhere: `step` of the mean site, less where the smallest site could not
    move that far within `spread`. A child differs from its parent in 1 to 3 exchanges (the less of two draws), each one
    level up here and one level down there, so all meet the target. Each of `generations` has `offspring` children.
    `survivors` of them are left by the first round of selection, half of them by each further one, until the parent
    competes with the best: it stays unless that one is better. The last round measures the loss on `samples`
    sequences, each one before on a quarter as many. The search is drawn from `seed`.
    """

    step: float = 0.05
    generations: int = 30
    offspring: int = 16
    survivors: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generations < 1 or self.offspring < 1 or not 1 <= self.survivors <= self.offspring:
            raise InvalidInput(
                f"evopress: generations {self.generations} and offspring {self.offspring} must be 1 or more, and "
                f"survivors {self.survivors} from 1 to offspring"
            )

    def allocate(self, sites: Sequence[Site], sparsity: float, objective: Objective | None = None) -> dict[str, float]:
        """See `Budget.allocate`."""
        measure, groups = self.objective_of(objective), self.groups(sites)
        if sparsity == 0 or sparsity >= MOST or len(groups) == 1:
            return dict.fromkeys((site.name for site in sites), sparsity)
        search = _Search(groups, sparsity, self.step, self.spread)
        draw = random.Random(self.seed)
        parent = (0,) * len(groups)
        loss = _finite(measure(search.allocation(parent)))
        for _ in range(self.generations):
            best = self._selected(search.children(parent, self.offspring, draw), search, measure)
            if best is not None and best[0] < loss:
                loss, parent = best
        return search.allocation(parent)

    def _selected(self, children: list[Levels], search: "_Search", measure: Objective) -> tuple[float, Levels] | None:
        """The best child, and its loss on all samples; None without children."""
        rounds = self.survivors.bit_length()  # until one is left
        found: list[tuple[float, Levels]] = [(0.0, child) for child in children]
        for number in range(rounds):
            kept = self.survivors >> number
            count = max(1, self.samples // FEWER ** (rounds - 1 - number))
            samples = None if number == rounds - 1 else count
            found = sorted((_finite(measure(search.allocation(each), samples)), each) for _, each in found)[:kept]
        return found[0] if found else None


class _Search:
    """What allocations there are around a sparsity, and the way from one to others."""

    def __init__(self, groups: Sequence[SiteGroup], sparsity: float, step: float, spread: float) -> None:
        costs = [group.cost for group in groups]
        weights = min(step * sum(costs) / len(costs), spread * min(costs))  # what a level gives up
        self._groups, self._sparsity = groups, sparsity
        self._steps = [weights / cost for cost in costs]
        least, most = max(sparsity - spread, 0.0), min(sparsity + spread, MOST)
        self._lowest = [-int((sparsity - least) / each + ROUNDING) for each in self._steps]
        self._highest = [int((most - sparsity) / each + ROUNDING) for each in self._steps]

    def allocation(self, levels: Levels) -> dict[str, float]:
        """The sparsity of each site."""
        found: dict[str, float] = {}
        for group, level, step in zip(self._groups, levels, self._steps, strict=True):
            found |= group.allocation(min(max(self._sparsity + level * step, 0.0), MOST) if level else self._sparsity)
        return found

    def children(self, parent: Levels, count: int, draw: random.Random) -> list[Levels]:
        """At most `count` that differ from one another and from their parent."""
        found: dict[Levels, None] = {}
        for _ in range(TRIES * count):
            child = parent
            for _ in range(min(draw.randint(1, FLIPS), draw.randint(1, FLIPS))):
                child = self._exchanged(child, draw)
            if child != parent:
                found[child] = None
            if len(found) == count:
                break
        return list(found)

    def _exchanged(self, levels: Levels, draw: random.Random) -> Levels:
        """One level up in one group and down in another, wherever there is room; the same where there is none."""
        up = [index for index, level in enumerate(levels) if level < self._highest[index]]
        down = [index for index, level in enumerate(levels) if level > self._lowest[index]]
        if not up or not down:
            return levels
        more, less = draw.choice(up), draw.choice(down)
        changed = list(levels)
        changed[more] += 1
        changed[less] -= 1
        return tuple(changed)


def _finite(loss: float) -> float:
    if loss != loss:
        raise NumericalError("a measured loss is NaN: measure at a smaller spread")
    return loss
