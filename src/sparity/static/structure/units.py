"""From scores of rows, columns and units to what stays."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sparity.errors import InvalidInput
from sparity.models.dimensions import Dimension


def per_unit(values: Tensor, width: int) -> Tensor:
    """Sums over the rows or columns of each unit: `[units * width]` -> `[units]`."""
    return values.view(-1, width).sum(1)


def over_cuts(dimension: Dimension, rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> list[Tensor]:
    """For each projection that a dimension runs through, its score per unit.

    `rows` and `columns` give each projection's scores `[out]` and `[in]`.
    """
    found = []
    for cut in dimension.cuts:
        values = (rows if cut.axis == "rows" else columns)[cut.projection]
        found.append(per_unit(values, cut.width))
    return found


def stacked(found: Sequence[Tensor | None]) -> Tensor:
    """One tensor `[blocks, size]`; NaN where a block has fewer units, or none."""
    size = max((len(each) for each in found if each is not None), default=0)
    result = torch.full((len(found), size), math.nan)
    for row, each in zip(result, found, strict=True):
        if each is not None:
            row[: len(each)] = each.float().cpu()
    return result


def rows_of(scores: Tensor) -> list[Tensor | None]:
    """The scores of each block without the padding of `stacked`; None for a block without any."""
    found = [row[~row.isnan()] for row in scores]
    return [row if len(row) else None for row in found]


def left_of(size: int, sparsity: float, multiple_of: int = 1) -> int:
    """How many units stay: all but `int(size * sparsity)`, at least one, rounded up to a multiple."""
    wanted = max(size - int(size * sparsity), 1)
    return min(-(-wanted // multiple_of) * multiple_of, size)


def blocks_left(size: int, sparsity: float) -> int:
    """How many blocks stay when a share goes, the number that goes rounded to the nearest; at least one."""
    return max(size - math.floor(size * sparsity + 0.5), 1)


def largest(importance: Tensor, count: int) -> Tensor:
    """The places of the `count` largest of `importance` [units], ascending, int64; of equal ones the later stay.

    That is the rule of pruning: of equal scores the one in the lower place goes first.
    """
    order = torch.sort(importance.float(), stable=True).indices
    return order[len(order) - count :].sort().values.cpu()


def best_of_groups(importance: Tensor, groups: int, count: int) -> Tensor:
    """The places of the `count` largest within each of `groups` equal runs of `importance`, ascending."""
    size = len(importance) // groups
    return torch.cat([largest(part, count) + size * g for g, part in enumerate(importance.view(groups, size))])


def choose_rows(scores: Tensor, sparsity: float, multiple_of: int = 1) -> list[Tensor | None]:
    """Of each block's units `[blocks, size]` those that stay."""
    return [None if row is None else largest(row, left_of(len(row), sparsity, multiple_of)) for row in rows_of(scores)]


def check_names(wanted: Iterable[str], known: Iterable[str], method: str) -> None:
    """Raise `InvalidInput` for a dimension that a model or method does not have."""
    offered = list(known)
    for name in wanted:
        if name not in offered:
            raise InvalidInput(f'{method} has no dimension "{name}" in this model: it has {", ".join(offered)}')
