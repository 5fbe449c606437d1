"""GPTQ: column by column, the columns behind make up for what rounding lost (Frantar et al. 2023, arXiv:2210.17323)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.calibration.statistics import DAMPING
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.matrices.settling import settle_columns
from sparity.static.quantize.column_rounding import ColumnRounding
from sparity.static.quantize.grids.base import Fitted
from sparity.static.quantize.methods.base import Method, Quantized, Task, fit_groups


@register("quantize.method", "gptq")
@dataclass(frozen=True)
class GPTQ(Method):
    """Optimal-brain-surgeon updates with one inverse Hessian for all rows; zeros stay zero inside the loop.

    `damping` is the share of the Hessian's mean diagonal that is added to it. Errors reach the columns behind a block
    of `block_columns` when it is done, and a group's grid is fitted when the block that holds its first column begins;
    with `static_groups` all grids are those of the weight as it came. With `act_order` columns of large inputs go
    first, on static groups.
    """

    damping: float = DAMPING
    block_columns: int = 128
    act_order: bool = False
    static_groups: bool = False

    needs: ClassVar[tuple[str, ...]] = ("gram",)

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise InvalidInput(f"damping {self.damping}: it must lie in [0, 1]")
        if self.block_columns < 1:
            raise InvalidInput(f"block_columns {self.block_columns}: it must be at least 1")

    @property
    def by_rows(self) -> bool:
        """Unless another order of the columns needs a copy of the whole matrix."""
        return not self.act_order

    @property
    def products(self) -> float:
        """The triangle of the factor."""
        return 1.0

    def quantize(self, task: Task) -> Quantized:
        """See `Method.quantize`."""
        order = _by_size(task.statistics) if self.act_order else torch.arange(task.weight.shape[1])
        known = permuted(task.statistics, order) if self.act_order else task.statistics
        factor, _ = known.inverse_factor(self.damping)
        columns = task.weight.T[order].contiguous()  # [in, out]
        rounding = ColumnRounding(columns, task.keep.T[order].contiguous(), (task.grid,), task.group)
        loop = _Loop(rounding, order // task.group, self.act_order or self.static_groups)
        if loop.static:
            fitted = fit_groups(task.grid, task.weight, task.group)
            for place in range(task.groups):
                rounding.use(place, Fitted(fitted.scales[:, place], fitted.zeros[:, place]))
        settle_columns(columns, factor, loop, self.block_columns)
        del factor
        codes = rounding.codes
        if self.act_order:
            back = order.argsort()
            columns, codes = columns[back], codes[back]
        return Quantized(columns.T, codes.T.contiguous(), rounding.scales, rounding.zeros, (task.grid,))


@dataclass(frozen=True)
class _Loop:
    rounding: ColumnRounding
    groups: Tensor  # [in]: the group of each column, as they are ordered
    static: bool

    def begin(self, block: slice) -> None:
        """See `Settle.begin`."""
        if not self.static:
            self.rounding.begin(block)

    def column(self, place: int) -> Tensor:
        """See `Settle.column`."""
        return self.rounding.column(place, int(self.groups[place]))


def _by_size(statistics: Statistics) -> Tensor:
    """`[in]`: the channels, those of the largest inputs first."""
    return statistics.gram.diagonal().argsort(descending=True, stable=True)


def permuted(statistics: Statistics, order: Tensor) -> Statistics:
    """What the Gram matrix would be if the channels came in another order."""
    gram = statistics.gram[order][:, order]
    return Statistics(
        statistics.site, frozenset({"gram"}), statistics.sequences, statistics.tokens, sums={"gram": gram}
    )
