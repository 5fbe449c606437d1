"""Two models on the same items: what their difference is worth, and how many items would show a smaller one.

Answers to the same question go together, so the two shares are no independent samples: only the items on which the
models differ say anything, and a test that forgets the pairs finds far less.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparity.errors import InvalidInput

CONFIDENCE, POWER, DRAWS = 0.95, 0.8, 10_000
CORRECTION = 0.5  # items: with it a limit is kept at least as often as it says, see `largest_drop`
_STEPS = 60  # of a bisection: beyond double precision


@dataclass(frozen=True)
class Pairs:
    """How often two models were right on the same items.

    Attributes:
        both: both were.
        lost: only the first was.
        won: only the second was.
        neither: none of them.
    """

    both: int
    lost: int
    won: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> "Pairs":
        """From what each model got for each item, 0 or 1.

        Raises:
            InvalidInput: other numbers, not as many of one as of the other, or none.
        """
        a, b = _checked(first, second)
        if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
            raise InvalidInput("right and wrong are 1 and 0: for other scores take the bootstrap of the difference")
        right, also = a == 1, b == 1
        return cls(
            int((right & also).sum()),
            int((right & ~also).sum()),
            int((~right & also).sum()),
            int((~right & ~also).sum()),
        )

    @property
    def items(self) -> int:
        """All of them."""
        return self.both + self.lost + self.won + self.neither

    @property
    def discordant(self) -> float:
        """The share on which the models differ."""
        return (self.lost + self.won) / self.items

    @property
    def change(self) -> float:
        """The second model's share less the first one's."""
        return (self.won - self.lost) / self.items


def mcnemar(pairs: Pairs) -> float:
    """The exact two-sided p of "both models are right equally often" (McNemar 1947, by the binomial distribution).

    Under it, each item on which they differ is the first's with probability 1/2; without any, p is 1.
    """
    from scipy.stats import binom

    differing, fewer = pairs.lost + pairs.won, min(pairs.lost, pairs.won)
    return min(1.0, 2 * float(binom.cdf(fewer, differing, 0.5))) if differing else 1.0


def bootstrap(
    first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """The interval of the mean of second - first: percentiles over items drawn with replacement, pairs kept together.

    Args:
        first: what one model got for each item; any numbers.
        second: what the other got for the same items.
        confidence: of the two-sided interval.
        draws: how many samples.
        seed: of the draw.

    A sample without any difference gives (0, 0): the bootstrap knows nothing of what it has not seen; `largest_drop`
    does.

    Raises:
        InvalidInput: not as many of one as of the other, or none.
    """
    a, b = _checked(first, second)
    values, counts = np.unique(b - a, return_counts=True)
    draw = np.random.default_rng(seed)
    if len(values) <= 64:  # right or wrong: how often each value is drawn is all that matters
        means = draw.multinomial(len(a), counts / len(a), size=draws) @ values / len(a)
    else:
        means = np.array([(b - a)[draw.integers(len(a), size=len(a))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def largest_drop(pairs: Pairs, confidence: float = CONFIDENCE) -> float:
    """The largest true drop from the first model to the second that the sample does not rule out, one-sided.

    The score limit of a paired difference (Tango 1998, Statistics in Medicine 17:891), with half an item of continuity
    correction. A gate "the drop is less than d" that passes when this is less than d passes a model whose drop is d in
    at most 1 - confidence of all samples.
    """
    z = _quantile(confidence)
    low, high = -1.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if drop_score(pairs, middle) <= -z else (middle, high)
    return high


def drop_score(pairs: Pairs, drop: float) -> float:
    """The score statistic of "the true drop is `drop`", corrected by half an item towards a larger drop.

    The variance is that of the most likely shares with this drop.
    """
    n, lost, won = pairs.items, pairs.lost, pairs.won
    variance = n * _variance_at(drop, lost / n, won / n)
    distance = lost - won + CORRECTION - n * drop
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def smallest_difference(items: int, discordant: float, confidence: float = CONFIDENCE, power: float = POWER) -> float:
    """The smallest true difference of two shares that so many items show with this power (Miettinen 1968).

    Args:
        items: of the sample.
        discordant: the share on which the models differ.
        confidence: of a two-sided test.
        power: how often a difference of this size is found.

    It is no smaller than one item, and no larger than 1: then the sample shows nothing.
    """
    if items < 1 or not 0 <= discordant <= 1:
        raise InvalidInput(f"{items} items, {discordant:g} of them different: expected at least one, and a share")
    a, b = _quantile((1 + confidence) / 2), _quantile(power)
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        share = max(discordant, middle)  # the difference is no more than the items that differ
        found = math.sqrt(items) * middle - a * math.sqrt(share) - b * math.sqrt(max(share - middle**2, 0.0))
        low, high = (low, middle) if found >= 0 else (middle, high)
    return max(high, 1 / items)


def items_needed(
    drop: float, discordant: float, true_drop: float = 0.0, confidence: float = CONFIDENCE, power: float = POWER
) -> int:
    """How many items a gate "the drop is less than `drop`" needs to pass a model with a smaller one, with this power.

    Args:
        drop: the limit, as a share.
        discordant: the share of items on which the models differ.
        true_drop: what the model really loses; 0 = nothing.
        confidence: of the gate, one-sided.
        power: how often the model passes.

    Raises:
        InvalidInput: the true drop is not under the limit, or shares that are none.
    """
    if not 0 <= discordant <= 1 or not 0 < drop <= 1 or not true_drop < drop or abs(true_drop) > discordant:
        raise InvalidInput(
            f"a limit of {drop:g}, a true drop of {true_drop:g} and {discordant:g} of the items different: the true "
            "drop must be under the limit, and no more than the items that differ"
        )
    a, b = _quantile(confidence), _quantile(power)
    at_limit = _variance_at(drop, (discordant + true_drop) / 2, (discordant - true_drop) / 2)
    really = discordant - true_drop**2
    needed = (a * math.sqrt(at_limit) + b * math.sqrt(really)) / (drop - true_drop)
    return math.ceil(needed**2 + 2 * CORRECTION / (drop - true_drop))


def _variance_at(drop: float, lost: float, won: float) -> float:
    """Of an item's difference, by the shares with this drop that are most likely where such shares were seen."""
    linear = -lost - won + (2 - lost + won) * drop
    constant = -won * drop * (1 - drop)
    share = (math.sqrt(max(linear**2 - 8 * constant, 0.0)) - linear) / 4  # of won
    return 2 * share + drop * (1 - drop)


def _checked(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise InvalidInput(f"{a.size} and {b.size} items: both models must have done the same, at least one")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InvalidInput("an item has no finite score")
    return a, b


def _quantile(probability: float) -> float:
    from scipy.stats import norm

    if not 0.5 <= probability < 1:
        raise InvalidInput(f"{probability:g}: a confidence or a power lies between 50 % and 100 %")
    return float(norm.ppf(probability))
