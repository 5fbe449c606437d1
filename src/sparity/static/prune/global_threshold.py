"""One threshold for the scores of all matrices: an allocation that nobody has to choose."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparity.budgets.base import Budget, Objective, Site
from sparity.errors import NumericalError
from sparity.static.prune.patterns.base import Pattern
from sparity.visible import logger

log = logger(__name__)

HALF = 1 << 16
COLLAPSED = 0.99  # of a matrix: worth a warning

Scores = Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class GlobalThreshold(Budget):
    """The lowest scores of the whole model go, whatever matrix they are in.

    Of N scores the `int(N * sparsity)` lowest are pruned, and all that equal the highest of them. `scores` yields every
    matrix's name and scores, one at a time; it is called twice. Counting the upper halves of the scores' bits finds
    the range that holds the threshold, counting the lower halves within that range finds the threshold itself: exact,
    without ever holding the scores of two matrices. A matrix without scores gets the sparsity asked for.
    """

    scores: Scores
    pattern: Pattern
    name: ClassVar[str] = "global threshold"

    def allocate(self, sites: Sequence[Site], sparsity: float, objective: Objective | None = None) -> dict[str, float]:
        """See `Budget.allocate`; the mean is met up to one score and the scores that equal it."""
        names = {site.name for site in sites}
        upper = {name: _count(keys >> 16) for name, keys in self._keys(names)}
        goal = int(sparsity * sum(counts.total for counts in upper.values()))
        if not goal:
            return dict.fromkeys(names, 0.0)
        found, below = _find(upper.values(), goal)
        lower = {name: _count((keys & (HALF - 1))[keys >> 16 == found]) for name, keys in self._keys(names)}
        threshold, _ = _find(lower.values(), goal - below)
        allocation = dict.fromkeys(names, sparsity)
        for name, counts in upper.items():
            pruned = counts.below(found) + lower[name].below(threshold + 1)
            allocation[name] = self.pattern.sparsity_of(pruned, counts.total)
            if allocation[name] > COLLAPSED:
                log.warning("%s: the global threshold removes %.1f %% of it", name, 100 * allocation[name])
        return allocation

    def _keys(self, names: set[str]) -> Iterator[tuple[str, Tensor]]:
        for name, scores in self.scores():
            if name in names:
                yield name, _ordered(self.pattern.competing(scores))


@dataclass(frozen=True)
class _Counts:
    """How often each value occurs, those that do not left out."""

    values: Tensor = field(repr=False)  # ascending
    counts: Tensor = field(repr=False)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def below(self, limit: int) -> int:
        return int(self.counts[self.values < limit].sum())


def _ordered(scores: Tensor) -> Tensor:
    """int32 keys, flat, in the order of float32 scores: the bits, those of negative numbers reversed."""
    if bool(scores.isnan().any()):
        raise NumericalError("the scores hold NaN: weights or statistics are damaged")
    bits = (scores.float() + 0.0).contiguous().view(torch.int32).flatten()  # -0 becomes 0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _count(halves: Tensor) -> _Counts:
    """Of halves of keys, each in [-32768, 65535]."""
    counts = torch.bincount(halves + HALF // 2, minlength=1).cpu()
    values = counts.nonzero().flatten()
    return _Counts(values - HALF // 2, counts[values])


def _find(counts: Iterable[_Counts], goal: int) -> tuple[int, int]:
    """The value of the `goal`-th lowest, counted from 1, and how many lie below that value."""
    total = torch.zeros(2 * HALF, dtype=torch.int64)
    for each in counts:
        total[each.values + HALF // 2] += each.counts
    reached = total.cumsum(0)
    place = int(torch.searchsorted(reached, goal))
    return place - HALF // 2, int(reached[place] - total[place])
