"""DSnoT: weights change places until a row's mean error is small (Zhang et al. 2023, arXiv:2310.08915)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.mean_exchanges import Exchanges
from sparity.static.prune.solvers.base import Choose, Solver, zeroed


@register("prune.solver", "dsnot")
@dataclass(frozen=True)
class DSnoT(Solver):
    """Dynamic sparse no training: refine a mask by what each weight adds to the mean of its output; weights stay.

    In each of at most `cycles` steps, a row whose mean error is above `threshold` revives the pruned weight that takes
    most of it away for its input's variance (to `variance_power`), and prunes the kept weight of the lowest Wanda score
    that takes some away too; of N:M, the lowest of the same group. A step that would not make the error smaller ends
    the row; with `same_sign` also one that turns it round. `reference` follows the published code step by step instead.
    """

    cycles: int = 50
    threshold: float = 0.1
    variance_power: float = 1.0
    same_sign: bool = False
    reference: bool = False

    exchanges: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("column_norm", "mean")

    def __post_init__(self) -> None:
        if self.cycles < 1 or self.threshold < 0 or self.variance_power < 0:
            raise InvalidInput("dsnot: at least 1 of cycles, and a threshold and variance_power that are not negative")

    def solve(self, weight: Tensor, statistics: Statistics, choose: Choose) -> tuple[Tensor, Tensor]:
        """See `Solver.solve`."""
        columns = weight.shape[1]
        width = choose.exchange_width(columns)
        dense, keep = weight.float(), choose(weight.float(), slice(0, columns)).clone()
        per_sequence = statistics.tokens / statistics.sequences
        squares = statistics.column_norm.double().square() / per_sequence  # means over tokens
        variance = (squares - statistics.mean.double().square()).clamp(min=0).float()
        shares = dense * statistics.mean * per_sequence  # what each weight adds to the sum of an output, per sequence
        scores = dense.abs() * statistics.column_norm
        growth = self._growth(shares, keep, variance)
        options = (self.cycles, self.threshold, self.same_sign, self.reference)
        keep = Exchanges(*options, shares, keep, growth, scores, width).refined()
        return zeroed(dense, keep), keep

    def _growth(self, shares: Tensor, keep: Tensor, variance: Tensor) -> Tensor:
        scale = variance.pow(self.variance_power)
        scale = scale if self.reference else scale.clamp(min=torch.finfo(torch.float32).tiny)
        growth: Tensor = (zeroed(shares, ~keep) / scale).sort(dim=1, stable=True).indices
        return growth
