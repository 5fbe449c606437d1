"""Mask only: pruned weights become zero, the others stay as they are."""

from dataclasses import dataclass

from torch import Tensor

from sparity.calibration import Statistics
from sparity.registry import register
from sparity.static.prune.solvers.base import Choose, Solver, zeroed


@register("prune.solver", "mask_only")
@dataclass(frozen=True)
class MaskOnly(Solver):
    """Apply the mask and nothing else, as magnitude pruning and Wanda do."""

    def solve(self, weight: Tensor, statistics: Statistics, choose: Choose) -> tuple[Tensor, Tensor]:
        """See `Solver.solve`."""
        keep = choose(weight.float(), slice(0, weight.shape[1]))
        return zeroed(weight.float(), keep), keep
