"""SparseGPT: prune column by column, let the columns behind make up (Frantar & Alistarh 2023, arXiv:2301.00774)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.calibration.statistics import DAMPING
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.solvers.base import Choose, Solver, zeroed


@register("solver", "sparsegpt")
@dataclass(frozen=True)
class SparseGPT(Solver):
    """Optimal-brain-surgeon updates with one inverse Hessian for all rows.

    Columns go from left to right in blocks of `block_columns`; the update of the columns behind a block waits until
    the block is done. The mask of a block is chosen on weights that earlier columns have already corrected: for the
    whole block at once, or for N:M when the first column of a group of M is reached.

    `damping` is the share of the Hessian's mean diagonal that is added to it; it is raised and logged when the matrix
    is singular. Channels that never fired are pruned first.
    """

    damping: float = DAMPING
    block_columns: int = 128

    needs: ClassVar[tuple[str, ...]] = ("gram",)
    own_score: ClassVar[str | None] = "obs"

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise InvalidInput(f"damping {self.damping}: it must lie in [0, 1]")
        if self.block_columns < 1:
            raise InvalidInput(f"block_columns {self.block_columns}: it must be at least 1")

    def solve(self, weight: Tensor, statistics: Statistics, choose: Choose) -> tuple[Tensor, Tensor]:
        """See `Solver.solve`."""
        factor, dead = statistics.inverse_factor(self.damping)  # [in, in] upper, [in]
        weight = weight.float().clone()
        weight[:, dead] = 0.0
        keep = torch.ones_like(weight, dtype=torch.bool)
        columns = weight.shape[1]
        width = max(self.block_columns // choose.column_multiple, 1) * choose.column_multiple
        for start in range(0, columns, width):
            end = min(start + width, columns)
            block = slice(start, end)
            errors = self._solve_block(weight[:, block], factor[block, block], keep[:, block], choose, start)
            weight[:, end:] -= errors @ factor[block, end:]
        return zeroed(weight, keep), keep

    def _solve_block(self, weight: Tensor, factor: Tensor, keep: Tensor, choose: Choose, start: int) -> Tensor:
        """Prune a block of columns in place; the scaled errors [out, width] are for the columns behind it."""
        width = weight.shape[1]
        diagonal = factor.diagonal()
        step = choose.column_step or width
        errors = torch.zeros_like(weight)
        for column in range(width):
            if column % step == 0:
                group = slice(column, min(column + step, width))
                scores = weight[:, group].square() / diagonal[group].square()
                keep[:, group] = choose(scores, slice(start + group.start, start + group.stop))
            current = weight[:, column]
            error = torch.where(keep[:, column], 0.0, current / diagonal[column])
            weight[:, column:] -= error[:, None] * factor[column, column:]
            errors[:, column] = error
        return errors
