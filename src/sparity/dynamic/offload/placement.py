"""Which units are always in memory: the most frequent ones, by sorting or by a mixed-integer programme.

PowerInfer (Song et al. 2023, arXiv:2312.12456): how often neurons count follows a power law, so a small part of them,
chosen once, does most of the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparity.dynamic.offload.slots import Units
from sparity.errors import InvalidInput, NumericalError

Frequencies = Sequence[NDArray[np.float64]]  # by layer, [units]: the share of tokens for which each counts
GROUP = 256  # neurons that the programme places together, as PowerInfer does
GAP = 1e-4  # relative, at which the solver stops
SECONDS = 30.0


@dataclass(frozen=True)
class Costs:
    """What the programme weighs.

    Attributes:
        near: seconds to multiply by one unit that is in memory.
        far: seconds to load one that is not.
        sync: seconds that a layer takes more when some of its units are not in memory.
    """

    near: float
    far: float
    sync: float = 0.0


def by_frequency(frequencies: Frequencies, room: int) -> list[Units]:
    """The `room` most frequent units of all layers: of each layer its own, rising. Of equals the first are taken."""
    every = np.concatenate([np.zeros(0), *frequencies])
    chosen = np.sort(np.argsort(-every, kind="stable")[: max(room, 0)])
    ends = np.cumsum([len(layer) for layer in frequencies])
    begins = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    return [
        chosen[np.searchsorted(chosen, begin) : np.searchsorted(chosen, end)] - begin
        for begin, end in zip(begins, ends, strict=True)
    ]


def by_programme(frequencies: Frequencies, room: int, costs: Costs, group: int = GROUP) -> list[Units]:
    """As `by_frequency`, groups of neighbours in frequency, so that a token takes the least time.

    The time of layer l is T_l >= near * (units in memory) + sync * z_l, since the hot ones are multiplied densely, and
    T_l >= far * (frequencies of the others), since loading and multiplying go on together; z_l is 1 where some are
    not in memory. The sum of T_l is minimised by HiGHS.

    Args:
        frequencies: by layer.
        room: units that may be in memory.
        costs: in one unit of time.
        group: units that are placed together.

    Raises:
        InvalidInput: a cost that is negative or infinite, or a group of no unit.
        NumericalError: the solver finds nothing.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    if group < 1 or not all(0 <= cost < np.inf for cost in (costs.near, costs.far, costs.sync)):
        raise InvalidInput(f"placement: costs must be finite and a group hold a unit, not {costs}, {group}")
    layers = len(frequencies)
    sorted_ = [np.argsort(-layer, kind="stable") for layer in frequencies]
    groups = [
        (index, order[at : at + group]) for index, order in enumerate(sorted_) for at in range(0, len(order), group)
    ]
    if not groups:
        return [np.empty(0, np.int64) for _ in frequencies]
    unit = max(costs.near, costs.far, costs.sync) or 1.0  # so that the solver's tolerances mean something
    near, far, sync = costs.near / unit, costs.far / unit, costs.sync / unit
    sizes = np.array([len(units) for _, units in groups], float)
    weights = np.array([frequencies[layer][units].sum() for layer, units in groups])
    of = np.zeros((layers, len(groups)))
    of[[layer for layer, _ in groups], np.arange(len(groups))] = 1
    one, count = np.eye(layers), of.sum(1)
    # variables: y [groups], z [layers], T [layers]
    rows = [
        (np.hstack([-near * of * sizes, -sync * one, one]), np.zeros(layers), np.inf),
        (np.hstack([far * of * weights, 0 * one, one]), far * (of * weights).sum(1), np.inf),
        (np.hstack([of, count[:, None] * one, 0 * one]), count, np.inf),
        (np.concatenate([sizes, np.zeros(2 * layers)])[None], np.array([-np.inf]), float(room)),
    ]
    constraints = [LinearConstraint(matrix, low, high) for matrix, low, high in rows]
    whole = np.concatenate([np.ones(len(groups) + layers), np.zeros(layers)])
    bounds = Bounds(0, np.concatenate([np.ones(len(groups) + layers), np.full(layers, np.inf)]))
    cost = np.concatenate([np.zeros(len(groups) + layers), np.ones(layers)])
    found = milp(
        cost, integrality=whole, bounds=bounds, constraints=constraints,
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )  # fmt: skip
    if found.x is None:
        raise NumericalError(f"placement: HiGHS found no placement ({found.message}): place by frequency instead")
    hot: list[list[Units]] = [[np.empty(0, np.int64)] for _ in frequencies]
    for (layer, units), chosen in zip(groups, found.x, strict=False):
        if chosen > 0.5:
            hot[layer].append(units)
    return [np.sort(np.concatenate(layer)) for layer in hot]


def time_of(frequencies: Frequencies, hot: Sequence[Units], costs: Costs) -> float:
    """What the programme minimises, of any placement."""
    total = 0.0
    for layer, units in zip(frequencies, hot, strict=True):
        cold = layer.sum() - layer[units].sum()
        near = costs.near * len(units) + costs.sync * (len(units) < len(layer))
        total += max(near, costs.far * cold)
    return float(total)
