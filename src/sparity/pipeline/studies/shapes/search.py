"""The best shape within limits, by trying every combination of sizes; and the front of all of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from sparity.errors import InvalidInput
from sparity.pipeline.studies.shapes.axes import Axis
from sparity.pipeline.studies.shapes.limits import Goal
from sparity.pipeline.studies.shapes.tensors import Sizes

MOST = 50_000  # combinations


@dataclass(frozen=True)
class Candidate:
    """A shape: the size of every axis, the sum of the shares of importance that go, and its seconds and bytes."""

    sizes: Sizes
    loss: float
    costs: Mapping[Goal, float]

    def order(self, goals: Sequence[Goal]) -> tuple[object, ...]:
        """What is better comes first: less loss, then less of each goal and fewer bytes, then larger first axes."""
        costs = [self.costs[goal] for goal in (*goals, "bytes")]
        return (self.loss, *costs, *(-size for size in self.sizes.values()))

    def keeps(self, most: Mapping[Goal, float]) -> bool:
        """Whether it costs no more than all limits allow."""
        return all(self.costs[goal] <= limit for goal, limit in most.items())

    def excess(self, most: Mapping[Goal, float]) -> float:
        """How much of the tightest limit is used, 1 being all of it."""
        return max(self.costs[goal] / limit if limit else float("inf") for goal, limit in most.items())


def candidates(
    axes: Sequence[Axis], legal: Callable[[Sizes], bool], costs: Callable[[Sizes], Mapping[Goal, float]]
) -> list[Candidate]:
    """Every legal combination of the axes' sizes; the model as it is is the last.

    Raises:
        InvalidInput: there are more than `MOST`.
    """
    count = prod(len(axis.sizes) for axis in axes)
    if count > MOST:
        raise InvalidInput(f"{count:,} combinations of sizes are more than {MOST:,}: lower steps, or raise least")
    found = []
    for picked in product(*(axis.sizes for axis in axes)):
        sizes = dict(zip((axis.name for axis in axes), picked, strict=True))
        if legal(sizes):
            loss = sum(axis.loss(size) for axis, size in zip(axes, picked, strict=True))
            found.append(Candidate(sizes, loss, costs(sizes)))
    return found


def best(found: Sequence[Candidate], most: Mapping[Goal, float]) -> Candidate | None:
    """The shape within all limits that loses least; None where there is none."""
    return min((one for one in found if one.keeps(most)), key=lambda one: one.order(tuple(most)), default=None)


def closest(found: Sequence[Candidate], most: Mapping[Goal, float]) -> Candidate:
    """The shape that misses the limits by the least factor."""
    return min(found, key=lambda one: (one.excess(most), one.order(tuple(most))))


def front(found: Sequence[Candidate], goals: Sequence[Goal]) -> list[Candidate]:
    """The shapes that no other one beats, from the least loss on: none loses as little and costs as little.

    Of shapes that are equal in all of that, the first by `Candidate.order` stands for the others.
    """
    kept: list[Candidate] = []
    for one in sorted(found, key=lambda each: each.order(goals)):
        if not any(all(other.costs[goal] <= one.costs[goal] for goal in goals) for other in kept):
            kept.append(one)
    return kept
