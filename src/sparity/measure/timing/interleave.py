"""Measurements in turns, so that the machine's noise hits every contender."""

import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

from sparity.measure.data.report import Spread

Result = TypeVar("Result")


def take_turns(contenders: Sequence[Callable[[], Result]], rounds: int) -> list[list[Result]]:
    """What each contender measures in each round: `[contender][round]`.

    Within a round each has one turn; the order is reversed from round to round. A round more is run first and not
    counted.
    """
    results: list[list[Result]] = [[] for _ in contenders]
    forward = range(len(contenders))
    for number in range(rounds + 1):
        for which in forward if number % 2 else reversed(forward):
            measured = contenders[which]()
            if number:
                results[which].append(measured)
    return results


def spread(values: Sequence[float]) -> Spread:
    """Median, lowest and highest."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """One over the other, round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])
