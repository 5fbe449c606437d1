"""The multiple-choice knapsack, solved exactly by HiGHS (Kellerer, Pferschy, Pisinger 2004, chapter 11)."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

SECONDS = 60.0  # after which the best choice found so far is taken
OF_HIGHS = b"HighsMipSolverData::"  # what its lines on trouble with a solution begin with
SMALLEST = 1e-30  # what is divided by, at least
SLACK = 1e-12  # of the goal, for sums in another order

Pairs = Mapping[tuple[int, int], NDArray[np.float64]]


def multiple_choice(
    values: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]],
    least: float,
    pairs: Pairs | None = None,
) -> list[int] | None:
    """One item of every group: the sum of values is least, and that of the weights is `least` or more.

    HiGHS takes a sum for the least that is within a millionth of the largest value; where the sum is smaller than that
    value, what exceeds it is left out and the rest is solved again, so that the millionth is one of the sum. Sums are
    counted from each group's least value.

    Args:
        values: by group and item; groups may have different numbers of items.
        weights: alike.
        least: what the weights must come to, up to rounding.
        pairs: of two groups `(a, b)`, by items `[of a, of b]`, a weight that comes on top when both are chosen.

    Returns:
        The place of each group's item, or None where no choice comes to `least`.
    """
    from scipy.optimize import LinearConstraint

    sizes = [len(group) for group in values]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    joint = dict(pairs or {})
    value = np.concatenate([np.asarray(group, dtype=np.float64) for group in values])
    weight = np.concatenate([np.asarray(group, dtype=np.float64) for group in weights])
    above = np.concatenate([np.asarray(group, dtype=np.float64) - min(group) for group in values])
    items, extra = len(value), sum(table.size for table in joint.values())
    gain = np.concatenate([weight, *(table.ravel() for table in joint.values())])
    scale = max(abs(least), float(np.abs(gain).max()), SMALLEST)
    one_each = np.zeros((len(sizes), items + extra))
    for group, (start, end) in enumerate(pairwise(starts)):
        one_each[group, start:end] = 1
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(gain[None] / scale, least / scale - SLACK, np.inf),
    ]
    if joint:
        constraints.append(LinearConstraint(_agreeing(joint, sizes, starts, items + extra), 0, 0))
    largest, found = np.inf, _chosen(value, np.ones(items), extra, constraints, starts)
    while found is not None and 0 < (total := float(sum(above[found]))) < min(largest, float(above.max())):
        largest = total
        again = _chosen(np.minimum(above, largest), above <= largest, extra, constraints, starts)
        if again is None or float(sum(above[again])) >= total:
            break
        found = again
    return None if found is None else [int(place) for place in found - starts[:-1]]


def _chosen(
    value: NDArray[np.float64],
    allowed: NDArray[Any],
    extra: int,
    constraints: Sequence[Any],
    starts: NDArray[np.int_],
) -> NDArray[np.int_] | None:
    """The item of each group, counted over all, for which the sum of `value` is least; only `allowed` ones."""
    from scipy.optimize import Bounds, milp

    with _standard_output_as_errors():
        solved = milp(
            np.concatenate([value / max(float(np.abs(value).max()), SMALLEST), np.zeros(extra)]),
            integrality=np.concatenate([np.ones(len(value)), np.zeros(extra)]),
            bounds=Bounds(0, np.concatenate([np.asarray(allowed, dtype=np.float64), np.ones(extra)])),
            options={"mip_rel_gap": 0.0, "time_limit": SECONDS, "presolve": False},
            constraints=constraints,
        )
    if solved.x is None:
        return None
    return np.array([start + int(solved.x[start:end].argmax()) for start, end in pairwise(starts)])


@contextmanager
def _standard_output_as_errors() -> Iterator[None]:
    """HiGHS says some things on standard output whatever it is told: they would stand among a caller's results.

    Its own are dropped; what others say meanwhile goes to standard error when the context closes.
    """
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
        yield
        return
    with TemporaryFile() as said:
        try:
            os.dup2(said.fileno(), 1)
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            said.seek(0)
            others = [line for line in said if not line.startswith(OF_HIGHS)]
            with suppress(OSError):  # it is closed
                os.write(2, b"".join(others))


def _agreeing(joint: Pairs, sizes: Sequence[int], starts: NDArray[np.int_], width: int) -> NDArray[np.float64]:
    """Rows that are 0 where each pair's variables sum to the choice of either group: then they are its product."""
    rows, start = [], int(starts[-1])
    for (first, second), table in joint.items():
        places = np.arange(start, start + table.size).reshape(sizes[first], sizes[second])
        start += table.size
        for group, lines in ((first, places), (second, places.T)):
            for item, line in enumerate(lines):
                row = np.zeros(width)
                row[line], row[starts[group] + item] = 1, -1
                rows.append(row)
    return np.array(rows)
