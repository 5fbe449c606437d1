"""The cheapest choice of everything whose measured loss keeps a limit, and the front of all such choices."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sparity.budgets.optimum.multiple_choice import multiple_choice
from sparity.stages.trials import Trial

POINTS = 8  # of the front
REFINEMENTS = 4  # between the best that keeps the limit and the first that does not
NEAR = 0.95  # of the limit: nearer need not be searched
MARGIN = 0.1  # of the way between the two that a refinement stays away from either


@dataclass(frozen=True)
class Table:
    """What can be chosen: by unit and choice, the cost and the loss in nats per token.

    `pairs` has, by two units, what their choices lose together beyond the sum of both: `[of one, of the other]`.
    """

    names: tuple[tuple[str, ...], ...]
    costs: tuple[tuple[float, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    pairs: Mapping[tuple[int, int], NDArray[np.float64]]

    def cost(self, picks: Sequence[int]) -> float:
        """What a choice of everything costs."""
        return sum(costs[pick] for costs, pick in zip(self.costs, picks, strict=True))

    def loss(self, picks: Sequence[int]) -> float:
        """What it loses by the table: the sum, and what pairs add to it."""
        alone = sum(losses[pick] for losses, pick in zip(self.losses, picks, strict=True))
        return alone + sum(float(table[picks[one], picks[other]]) for (one, other), table in self.pairs.items())

    def solve(self, most: float) -> list[int] | None:
        """The cheapest choice that loses at most `most`; None where there is none."""
        able = [self._able(unit, most) for unit in range(len(self.names))]
        if not all(able):
            return None
        costs = [[self.costs[unit][pick] for pick in own] for unit, own in enumerate(able)]
        gains = [[-self.losses[unit][pick] for pick in own] for unit, own in enumerate(able)]
        pairs = {(one, other): -table[np.ix_(able[one], able[other])] for (one, other), table in self.pairs.items()}
        found = multiple_choice(costs, gains, -most, pairs)
        return None if found is None else [own[pick] for own, pick in zip(able, found, strict=True)]

    def _able(self, unit: int, most: float) -> list[int]:
        """The choices of a unit that the cheapest choice of everything may have: few and small numbers are exact.

        Where no pair is known to lose less than its sum, those that lose more than everything may, and those that
        another one of the unit beats, are none of them.
        """
        costs, losses = self.costs[unit], self.losses[unit]
        every = range(len(costs))
        if any(bool((table < 0).any()) for table in self.pairs.values()):
            return list(every)
        left = [pick for pick in every if losses[pick] <= most]
        if any(unit in pair for pair in self.pairs):
            return left
        return [
            pick
            for pick in left
            if not any(
                (costs[other], losses[other], other) < (costs[pick], losses[pick], pick)
                and costs[other] <= costs[pick]
                and losses[other] <= losses[pick]
                for other in left
            )
        ]

    def extremes(self) -> tuple[float, float]:
        """The least loss above 0 that a single choice has, and that of the cheapest of all."""
        cheapest = [min(range(len(costs)), key=lambda i: (costs[i], losses[i])) for costs, losses in self._both]
        low = min((loss for losses in self.losses for loss in losses if loss > 0), default=0.0)
        return low, self.loss(cheapest)

    @property
    def _both(self) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
        return list(zip(self.costs, self.losses, strict=True))


@dataclass(frozen=True)
class Point:
    """A choice of everything: its places, what it costs, what the table says that it loses, and what it does lose."""

    picks: tuple[int, ...]
    cost: float
    predicted: float
    measured: Trial
    excess: float  # how much of the limit is used; above 1 it is missed


def front(table: Table, measure: Callable[[Sequence[int]], Trial], excess: Callable[[Trial], float]) -> list[Point]:
    """Choices from the model as it is to the cheapest of all, measured; then the best within the limit is looked for.

    Losses of units do not quite add up, so what a sum of losses comes to is measured at every point, and the table is
    asked for a sum that would come to the limit by the two points next to it.
    """
    points: dict[tuple[int, ...], Point] = {}

    def add(most: float) -> Point | None:
        picks = table.solve(most)
        if picks is None:
            return None
        key = tuple(picks)
        if key not in points:
            found = measure(picks)
            points[key] = Point(key, table.cost(picks), table.loss(picks), found, excess(found))
        return points[key]

    low, high = table.extremes()
    add(0.0)
    if low > 0:
        for most in np.geomspace(low, max(high, low), POINTS):
            add(float(most) * (1 + 1e-9))
    for _ in range(REFINEMENTS):
        ends = _around(list(points.values()))
        if ends is None or ends[0].excess >= NEAR:
            break
        before = len(points)
        add(_between(*ends))
        if len(points) == before:
            break
    return sorted(points.values(), key=lambda point: point.predicted)


def best(points: Sequence[Point]) -> Point | None:
    """The cheapest that keeps the limit."""
    return min((point for point in points if point.excess <= 1), key=lambda point: point.cost, default=None)


def _around(points: Sequence[Point]) -> tuple[Point, Point] | None:
    """The neighbours, by what the table says, of which one keeps the limit and the next does not."""
    ordered = sorted(points, key=lambda point: point.predicted)
    return next(((one, other) for one, other in pairwise(ordered) if one.excess <= 1 < other.excess), None)


def _between(kept: Point, missed: Point) -> float:
    """The sum of losses at which the limit lies on a straight line between two points."""
    way = (1 - kept.excess) / (missed.excess - kept.excess)
    return kept.predicted + (missed.predicted - kept.predicted) * min(max(way, MARGIN), 1 - MARGIN)
