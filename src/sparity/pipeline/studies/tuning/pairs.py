"""What two units lose together beyond the sum of both: measured for the pairs for which most is at stake."""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from sparity.pipeline.studies.tuning.losses import together
from sparity.pipeline.studies.tuning.search import Table
from sparity.pipeline.studies.tuning.units import Unit
from sparity.stages.trials import Trials

NEIGHBOURS = 1  # blocks that two units of a pair may lie apart


def interaction(both: float, one: float, other: float) -> float:
    """The cosine between two errors, from the losses of both together and of each alone.

    To second order a loss is a squared length, and two errors lose `one + other + 2 cosine sqrt(one other)`.
    """
    if one <= 0 or other <= 0:
        return 0.0
    return min(max((both - one - other) / (2 * math.sqrt(one * other)), -1.0), 1.0)


def measured_pairs(
    trials: Trials, units: Sequence[Unit], table: Table, picks: Sequence[int], count: int
) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], NDArray[np.float64]]]:
    """By two units, the cosine found at `picks`, and what each two of their choices lose beyond the sum by it.

    Measured are the `count` pairs with the largest losses, in one block or in neighbouring ones.
    """
    losses = [table.losses[unit][pick] for unit, pick in enumerate(picks)]
    near = [
        (one, other)
        for one, other in combinations(range(len(units)), 2)
        if units[other].block - units[one].block <= NEIGHBOURS and losses[one] > 0 and losses[other] > 0
    ]
    near.sort(key=lambda pair: -losses[pair[0]] * losses[pair[1]])
    cosines, found = dict[tuple[int, int], float](), {}
    for one, other in near[:count]:
        chosen = {units[place].name: table.names[place][picks[place]] for place in (one, other)}
        sets = ((one, other), (one,), (other,))
        both, alone, beside = (together(trials, [units[i] for i in places], chosen).kl for places in sets)
        lengths = [np.sqrt(np.asarray(table.losses[place])) for place in (one, other)]
        cosines[one, other] = interaction(both, alone, beside)
        found[one, other] = 2 * cosines[one, other] * np.outer(*lengths)
    return cosines, found
