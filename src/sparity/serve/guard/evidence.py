"""Evidence about a mean, gathered one number after another, that may be looked at after each of them.

Betting against a bound (Waudby-Smith and Ramdas 2024, arXiv:2010.09686): a stake of 1 is multiplied by
`1 + share * (x / bound - 1)` for each number, which in the mean is at most 1 as long as the mean is at most the bound,
whatever the numbers' distribution is. By Ville's inequality the capital then ever reaches `1 / level` with a
probability of at most `level`, however often one looks. Several shares are bet at once, and so is on several
beginnings: at the n-th number a stake of `1 / (n (n + 1))` joins, so that a change is noticed also after a long time.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

SHARES = np.array([0.01, 0.03, 0.1, 0.3, 0.9])
MOST = 5.0  # bounds: numbers above count as that where their mean is to be shown to be low


class Evidence(ABC):
    """What the bets have come to.

    Args:
        bound: of the mean, given what came before.
        streams: of numbers that are looked at side by side, each for itself; None = one.
    """

    shares = SHARES

    def __init__(self, bound: float, streams: int | None = None) -> None:
        self._bound, self._seen = bound, 0
        self._shares = self.shares if streams is None else self.shares[:, None]
        self._capital = np.zeros(len(SHARES) if streams is None else (len(SHARES), streams))

    def add(self, x: Any) -> Any:
        """The evidence after one more number, or one of each stream: 1 or less where there is none."""
        self._seen += 1
        stake = 1 / (self._seen * (self._seen + 1))
        self._capital = (self._capital + stake) * (1 + self._shares * self.gain(x / self._bound))
        return self._capital.mean(0)

    @abstractmethod
    def gain(self, bounds: Any) -> Any:
        """What a whole stake gains by a number, given in bounds."""


class Above(Evidence):
    """Evidence that the mean of numbers from 0 on lies above a bound."""

    def gain(self, bounds: Any) -> Any:
        """See `Evidence.gain`."""
        return bounds - 1


class Below(Evidence):
    """Evidence that the mean of numbers from 0 on, those above `MOST` bounds cut, lies below a bound."""

    shares = SHARES / (MOST - 1)

    def gain(self, bounds: Any) -> Any:
        """See `Evidence.gain`."""
        return 1 - np.minimum(bounds, MOST)
