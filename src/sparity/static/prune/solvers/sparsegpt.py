"""SparseGPT: prune column by column, let the columns behind make up (Frantar & Alistarh 2023, arXiv:2301.00774)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.calibration.statistics import DAMPING
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.solvers.base import Choose, Solver, zeroed

STRIP = 16


@register("prune.solver", "sparsegpt")
@dataclass(frozen=True)
class SparseGPT(Solver):
    """Optimal-brain-surgeon updates with one inverse Hessian for all rows.

    Columns go from left to right in blocks of `block_columns`; the update of the columns behind a block waits until
    the block is done. The mask of a block is chosen on weights that earlier columns have already corrected: for the
    whole block at once, or for N:M when the first column of a group of M is reached.

    `damping` is the share of the Hessian's mean diagonal that is added to it; it is raised and logged when the matrix
    is singular. Channels that never fired are pruned first; a weight there that the mask keeps stays what it was.
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
        columns = weight.float().T.contiguous()  # [in, out]: a column of the weight lies together in memory
        columns[dead] = 0.0
        keep = torch.ones_like(columns, dtype=torch.bool)
        width = max(self.block_columns // choose.column_multiple, 1) * choose.column_multiple
        for start in range(0, len(columns), width):
            block = slice(start, min(start + width, len(columns)))
            errors = _solve_block(columns[block], factor[block, block], keep[block], choose, start)
            columns[block.stop :] -= factor[block, block.stop :].T @ errors
        columns[dead] = weight.float().T[dead]
        keep = keep.T.contiguous()
        return zeroed(columns.T, keep), keep


def _solve_block(columns: Tensor, factor: Tensor, keep: Tensor, choose: Choose, start: int) -> Tensor:
    """Prune a block of columns `[width, out]` in place; the scaled errors [width, out] are for the columns behind it.

    The block is cut into strips of a few columns, for the reason that cuts the matrix into blocks: a column's error
    goes to the rest of its strip at once, and to the columns behind the strip together with those of its neighbours.
    """
    width = len(columns)
    diagonal = factor.diagonal()[:, None]
    step = choose.column_step or width
    strip = STRIP if step == width else max(STRIP // step, 1) * step  # a group to be chosen lies within one strip
    errors = torch.zeros_like(columns)
    for first in range(0, width, strip):
        last = min(first + strip, width)
        for column in range(first, last):
            if column % step == 0:
                group = slice(column, min(column + step, width))
                scores = (columns[group] / diagonal[group]).square().T
                keep[group] = choose(scores, slice(start + group.start, start + group.stop)).T
            errors[column] = torch.where(keep[column], 0.0, columns[column] / diagonal[column])
            columns[column + 1 : last].addr_(factor[column, column + 1 : last], errors[column], alpha=-1)
        columns[last:] -= factor[first:last, last:].T @ errors[first:last]
    return errors
