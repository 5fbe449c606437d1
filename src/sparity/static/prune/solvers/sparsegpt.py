"""SparseGPT: prune column by column, let the columns behind make up (Frantar & Alistarh 2023, arXiv:2301.00774)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.calibration.statistics import DAMPING
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.matrices.settling import settle_columns
from sparity.static.prune.solvers.base import Choose, Solver, zeroed
from sparity.static.quantize.column_rounding import ColumnRounding
from sparity.static.quantize.grids.base import Grid
from sparity.static.quantize.methods.base import check_group
from sparity.static.quantize.quantizing import build_grid


@register("prune.solver", "sparsegpt")
@dataclass(frozen=True)
class SparseGPT(Solver):
    """Optimal-brain-surgeon updates with one inverse Hessian for all rows.

    Columns go from left to right in blocks of `block_columns`; the update of the columns behind a block waits until
    the block is done. The mask of a block is chosen on weights that earlier columns have already corrected: for the
    whole block at once, or for N:M when the first column of a group of M is reached.

    `damping` is the share of the Hessian's mean diagonal that is added to it; it is raised and logged when the matrix
    is singular. Channels that never fired are pruned first; a weight there that the mask keeps stays what it was.

    With `bits` the weights that stay are rounded in the same loop, so that later columns make up for both: to integers
    with a zero point unless `symmetric`, on one grid per row of the dense weight, or per `group` of columns; `signed`
    is that of the grid of integers.
    """

    damping: float = DAMPING
    block_columns: int = 128
    bits: int | None = None
    group: int | None = None
    symmetric: bool = False
    signed: bool = False

    needs: ClassVar[tuple[str, ...]] = ("gram",)
    own_score: ClassVar[str | None] = "obs"
    by_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise InvalidInput(f"damping {self.damping}: it must lie in [0, 1]")
        if self.block_columns < 1:
            raise InvalidInput(f"block_columns {self.block_columns}: it must be at least 1")
        if self.bits is None and (self.group is not None or self.symmetric or self.signed):
            raise InvalidInput("sparsegpt: group, symmetric and signed say how weights are rounded: give bits too")
        if self.bits is not None:
            self._grid(self.bits)

    def solve(self, weight: Tensor, statistics: Statistics, choose: Choose) -> tuple[Tensor, Tensor]:
        """See `Solver.solve`."""
        factor, dead = statistics.inverse_factor(self.damping)  # [in, in] upper, [in]
        columns = weight.float().T.contiguous()  # [in, out]: a column of the weight lies together in memory
        width = max(self.block_columns // choose.column_multiple, 1) * choose.column_multiple
        keep = torch.ones_like(columns, dtype=torch.bool)
        rounding = self._rounding(columns, keep, statistics.site)
        loop = _Loop(columns, factor.diagonal(), dead, keep, choose, rounding)
        settle_columns(columns, factor, loop, width, choose.column_step)
        keep = keep.T.contiguous()
        return zeroed(columns.T, keep), keep

    def _rounding(self, columns: Tensor, keep: Tensor, site: str) -> ColumnRounding | None:
        if self.bits is None:
            return None
        group = check_group(self.group, len(columns), site)
        return ColumnRounding(columns, keep, (self._grid(self.bits),), group)

    def _grid(self, bits: int) -> Grid:
        return build_grid({"integers": {"signed": self.signed}}, bits, self.symmetric)


@dataclass
class _Loop:
    """Columns lose what the mask takes, and with `rounding` what their grids cannot express."""

    columns: Tensor  # [in, out]
    diagonal: Tensor  # [in], of the factor
    dead: Tensor  # [in], channels that never fired: no other column knows of theirs
    keep: Tensor  # [in, out], filled block by block
    choose: Choose
    rounding: ColumnRounding | None
    start: int = 0
    stop: int = 0

    def begin(self, block: slice) -> None:
        """See `Settle.begin`."""
        self.start, self.stop = block.start, block.stop
        if self.choose.column_step is None:
            self._choose(block)
        if self.rounding is not None:
            self.rounding.begin(block)

    def column(self, place: int) -> Tensor:
        """See `Settle.column`."""
        step = self.choose.column_step
        if step is not None and (place - self.start) % step == 0:
            self._choose(slice(place, min(place + step, self.stop)))
        if self.rounding is not None:
            return torch.where(self.keep[place], self.rounding.column(place), 0.0)
        return torch.where(self.keep[place], self.columns[place], 0.0)

    def _choose(self, group: slice) -> None:
        scores = (self.columns[group] / self.diagonal[group, None]).square()
        scores[self.dead[group]] = 0.0
        self.keep[group] = self.choose(scores.T, group).T
