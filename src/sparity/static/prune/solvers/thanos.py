"""Thanos: a row loses all weights of a block of columns at once (Ilin & Richtarik 2025, arXiv:2504.05346)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.calibration.statistics import DAMPING
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.compare_within import CompareWithin
from sparity.static.prune.solvers.base import Choose, Solver, zeroed

LARGEST_BATCH = 1 << 22  # numbers of the systems that are solved together


@register("prune.solver", "thanos")
@dataclass(frozen=True)
class Thanos(Solver):
    """Optimal-brain-surgeon updates of a whole block of columns, exact for all weights that a row loses there.

    The mask of a block is chosen by weight times input norm, on weights that earlier blocks have already corrected: of
    `block_columns` columns, or of one group of N:M. `damping` is the share of the Hessian's mean diagonal that is added
    to it.
    """

    damping: float = DAMPING
    block_columns: int = 128

    needs: ClassVar[tuple[str, ...]] = ("gram",)
    own_score: ClassVar[str | None] = "wanda"
    compare_within: ClassVar[CompareWithin | None] = "layer"

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise InvalidInput(f"damping {self.damping}: it must lie in [0, 1]")
        if self.block_columns < 1:
            raise InvalidInput(f"block_columns {self.block_columns}: it must be at least 1")

    def solve(self, weight: Tensor, statistics: Statistics, choose: Choose) -> tuple[Tensor, Tensor]:
        """See `Solver.solve`."""
        factor, dead = statistics.inverse_factor(self.damping)  # [in, in] upper, [in]
        norms = torch.where(dead, 0.0, statistics.gram.diagonal())
        current, keep = weight.float().clone(), torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        width = choose.column_step or max(self.block_columns // choose.column_multiple, 1) * choose.column_multiple
        for start in range(0, weight.shape[1], width):
            block = slice(start, min(start + width, weight.shape[1]))
            keep[:, block] = choose(current[:, block].square() * norms[block], block)
            rest = factor[block, start:]  # [width, in - start]: the trailing inverse is its product with itself
            current[:, start:] -= removal(current[:, block], ~keep[:, block], rest[:, : block.stop - start]) @ rest
        return zeroed(current, keep), keep


def removal(weight: Tensor, pruned: Tensor, factor: Tensor) -> Tensor:
    """What is multiplied with the factor's rows to remove the `pruned` weights of a block `[rows, width]` at once.

    With A the columns of the factor `[width, width]` that a row loses, the multipliers solve (AT A) l = w; the result
    is A l for each row, `[rows, width]`.
    """
    found = torch.empty_like(weight)
    size = max(LARGEST_BATCH // factor.numel(), 1)
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        lost = pruned[rows].to(weight.dtype)  # [rows, width]
        columns = factor * lost[:, None, :]  # [rows, width, width]
        systems = columns.transpose(1, 2) @ columns + torch.diag_embed(1 - lost)
        multipliers = torch.linalg.solve(systems, (weight[rows] * lost)[..., None])
        found[rows] = (columns @ multipliers)[..., 0]
    return found
