"""Units of blocks beside whose weights low ranks are trained: how important they are, and which stay."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from sparity.models import Block
from sparity.models.dimensions import Dimension
from sparity.models.families.base import Family
from sparity.static.structure.low_ranks import Adapted
from sparity.static.structure.units import largest, per_unit

TINY = 1e-8  # beside a norm that is divided by


@dataclass
class Group:
    """The units of one dimension of a block, while low ranks are trained.

    Attributes:
        block: the number of the block.
        dimension: what its units run through.
        average: the moving average of their importance, float32 `[size]`.
        stays: bool `[size]`, whether a unit is still there.
    """

    block: int
    dimension: Dimension
    average: Tensor = field(init=False)
    stays: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.average = torch.zeros(self.dimension.size)
        self.stays = torch.ones(self.dimension.size, dtype=torch.bool)

    def observe(self, saliences: Mapping[str, Tensor], decay: float) -> None:
        """Add a step to the average; `saliences` are those of the projections, `[out, in]`."""
        found = torch.zeros_like(self.average)
        for cut in self.dimension.cuts:
            lines = saliences[cut.projection].sum(1 if cut.axis == "rows" else 0).float().cpu()
            units = per_unit(lines, cut.width)
            found += units / (units.norm() + TINY)
        self.average = decay * self.average + (1 - decay) * found

    def keep(self, count: int, adapted: Mapping[str, Adapted]) -> None:
        """Make all units zero but `count`, the least important first; none comes back that is gone."""
        stays = torch.zeros_like(self.stays)
        stays[largest(self.average.masked_fill(~self.stays, -1.0), count)] = True
        gone = (self.stays & ~stays).nonzero().flatten()
        self.stays = stays
        for cut in self.dimension.cuts:
            each = adapted[cut.projection]
            for tensor in (each.layer.mask, each.stored):
                matrix = each.projection.shown(tensor)
                rows = matrix if cut.axis == "rows" else matrix.T
                rows[cut.indices(gone).to(rows.device)] = 0


def groups_of(blocks: Iterable[Block], family: Family, config: Any) -> list[Group]:
    """The units of every dimension of some blocks of a model, which has its weights as they were loaded."""
    return [
        Group(block.index, dimension)
        for block in blocks
        for dimension in family.dimensions(block.module, block.name, config)
    ]


def observe(groups: Iterable[Group], adapted: Mapping[str, Adapted], decay: float) -> None:
    """Add what the gradients of a step say to the averages of groups, which come block by block."""
    for _, of_block in groupby(groups, lambda group: group.block):
        parts, stored, saliences = list(of_block), dict[nn.Module, Tensor](), dict[str, Tensor]()
        for name in (cut.projection for group in parts for cut in group.dimension.cuts):
            each = adapted[name]
            if each.layer not in stored:  # projections may share a stored weight
                stored[each.layer] = each.salience()
            saliences[name] = each.projection.shown(stored[each.layer])
        for group in parts:
            group.observe(saliences, decay)


def cubic_sparsity(step: int, steps: int, sparsity: float, warmup: float, cooldown: float) -> float:
    """The share that is gone in a step, from 0: none at first, all of it at the end, between them along a cubic.

    Args:
        step: from 0.
        steps: of the training.
        sparsity: at the end, in the last step at the latest.
        warmup: the share of the steps before anything goes.
        cooldown: the share of the steps in which all is gone.
    """
    begin, end = warmup * steps, steps - cooldown * steps
    if step >= min(end, steps - 1):
        return sparsity
    if step <= begin:
        return 0.0
    return sparsity * (1 - (1 - (step - begin) / (end - begin)) ** 3)
