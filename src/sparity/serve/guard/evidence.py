"""Evidence about a mean, gathered one number after another, that may be looked at after each of them.

Betting against a bound (Waudby-Smith and Ramdas 2024, arXiv:2010.09686): a stake of 1 is multiplied by
`1 + share * (x / bound - 1)` for each number, which in the mean is at most 1 as long as the mean is at most the bound,
whatever the numbers' distribution is. By Ville's inequality the capital then ever reaches `1 / level` with a probability
of at most `level`, however often one looks. Several shares are bet at once, and so is on several beginnings: at the n-th
number a stake of `1 / (n (n + 1))` joins, so that a change is noticed also after a long time without one.
"""

from typing import Any

import numpy as np

SHARES = np.array([0.01, 0.03, 0.1, 0.3, 0.9])
MOST = 5.0  # bounds: numbers above count as that where their mean is to be shown to be low


class Above:
    """Evidence that the mean of numbers from 0 on lies above a bound.

    Args:
        bound: of the mean, given what came before.
        streams: of numbers that are looked at side by side, each for itself; None = one.
    """

    def __init__(self, bound: float, streams: int | None = None) -> None:
        self._bound, self._seen = bound, 0
        self._capital = np.zeros(len(SHARES) if streams is None else (len(SHARES), streams))
        self._shares = SHARES if streams is None else SHARES[:, None]

    def add(self, x: Any) -> Any:
        """The evidence after one more number, or one of each stream: 1 or less where there is none."""
        self._seen += 1
        stake = 1 / (self._seen * (self._seen + 1))
        self._capital = (self._capital + stake) * (1 + self._shares * (x / self._bound - 1))
        return self._capital.mean(0)


class Below:
    """Evidence that the mean of numbers from 0 on, those above `MOST` bounds cut, lies below a bound.

    Args:
        bound: see `Above`, as for `streams`.
    """

    def __init__(self, bound: float, streams: int | None = None) -> None:
        self._bound = bound
        self._capital = np.ones(len(SHARES) if streams is None else (len(SHARES), streams))
        shares = SHARES / (MOST - 1)
        self._shares = shares if streams is None else shares[:, None]

    def add(self, x: Any) -> Any:
        """See `Above.add`."""
        self._capital = self._capital * (1 + self._shares * (1 - np.minimum(x / self._bound, MOST)))
        return self._capital.mean(0)
