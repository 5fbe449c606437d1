"""Rounding column by column, for loops in which every column makes up for the ones before it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparity.static.quantize.grids.base import Fitted, Grid


class ColumnRounding:
    """Grids of groups of columns, fitted when a block of columns is reached, and the codes that columns got.

    A group's grid spans its weights as they are when the block that holds its first column begins: corrected by all
    blocks before, not by the columns before it in the same block. That is what the code of GPTQ does.

    Args:
        columns: `[in, out]`, changed by the loop.
        keep: bool `[in, out]`; weights outside are not looked at.
        grids: one, or one per group.
        group: how many columns share a grid.
        fit: gives the grid of weights `[out, group]` of the group at a place; `grid.fit` when it is None.
    """

    def __init__(
        self,
        columns: Tensor,
        keep: Tensor,
        grids: Sequence[Grid],
        group: int,
        fit: Callable[[int, Grid, Tensor], Fitted] | None = None,
    ) -> None:
        inputs, outputs = columns.shape
        self.columns, self.keep, self.group = columns, keep, group
        self.grids = tuple(grids) * (inputs // group) if len(grids) == 1 else tuple(grids)
        self.fit = fit or (lambda place, grid, weight: grid.fit(weight))
        self.scales = torch.ones(outputs, inputs // group, device=columns.device)
        self.zeros = torch.zeros_like(self.scales)
        self.codes = torch.zeros(columns.shape, dtype=torch.int16, device=columns.device)

    def begin(self, block: slice) -> None:
        """Fit the grids of the groups whose first column lies in `block`."""
        for place in range(-(-block.start // self.group), -(-block.stop // self.group)):
            members = slice(place * self.group, (place + 1) * self.group)
            weight = torch.where(self.keep[members], self.columns[members], 0.0).T
            self.use(place, self.fit(place, self.grids[place], weight.contiguous()))

    def use(self, place: int, fitted: Fitted) -> None:
        """Take a grid for the group at `place`."""
        self.scales[:, place], self.zeros[:, place] = fitted.scales, fitted.zeros

    def column(self, place: int, group: int | None = None) -> Tensor:
        """The nearest values `[out]` of the column at `place`, 0 outside the mask; its codes are remembered.

        `group` is the place of its group, where columns do not lie in their own order.
        """
        group = place // self.group if group is None else group
        grid, scales, zeros = self.grids[group], self.scales[:, group], self.zeros[:, group]
        codes = grid.codes(torch.where(self.keep[place], self.columns[place], 0.0), scales, zeros)
        self.codes[place] = codes
        return grid.values(codes, scales, zeros)
