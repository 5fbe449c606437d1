"""Units of all blocks that compete for one share of the weights, by what each costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.models.dimensions import Cut, Dimension


@dataclass
class Part:
    """One dimension of one block: where its columns lie, what its units cost, and how many weights each has."""

    cut: Cut
    costs: Tensor
    weights: int


def unit_weights(dimension: Dimension, weights: Mapping[str, Tensor]) -> int:
    """How many weights go with one unit of a dimension; `weights` are those of its projections, `[out, in]`."""
    return sum(cut.width * weights[cut.projection].shape[1 if cut.axis == "rows" else 0] for cut in dimension.cuts)


def cheapest(
    parts: Mapping[str, Sequence[Part]], dense: Mapping[str, Sequence[int]], gone: float
) -> dict[str, list[Tensor]]:
    """The units that stay when those of least cost per weight go, as long as no more than the share `gone` does.

    One unit at least stays of every dimension of every block.
    """
    staying = {name: [list(range(len(part.costs))) for part in found] for name, found in parts.items()}
    budget = 0.0
    units = []
    for name, found in parts.items():
        for index, part in enumerate(found):
            budget += part.weights * (len(part.costs) - dense[name][index] * (1 - gone))
            each = (part.costs / part.weights).tolist()
            units += [(cost, name, index, unit, part.weights) for unit, cost in enumerate(each)]
    for _, name, index, unit, weights in sorted(units):
        if len(staying[name][index]) == 1:
            continue
        if weights > budget * (1 + 1e-9):
            break
        budget -= weights
        staying[name][index].remove(unit)
    return {name: [torch.tensor(rows) for rows in found] for name, found in staying.items()}
