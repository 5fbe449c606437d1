"""SparseSwaps: the best exchange of two weights, again and again (Zimmer et al. 2025, arXiv:2512.10922)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.calibration import Statistics
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.best_exchanges import LARGEST_TABLE, Exchanges
from sparity.static.prune.solvers.base import Choose, Solver, zeroed


@register("prune.solver", "sparse_swaps")
@dataclass(frozen=True)
class SparseSwaps(Solver):
    """Refine a mask: in each row the kept and the pruned weight whose exchange brings the output closest change places.

    It starts from the mask of the score and keeps its count in every row, and in every group of an N:M pattern. Gains
    are exact, from the Gram matrix; weights stay as they are. Pairs are looked for among the `candidates` weights that
    are cheapest to prune and as many that are best to revive, and among all pairs once these gain nothing; a row is
    done when no pair does, or after `swaps`.
    """

    swaps: int = 100
    candidates: int = 32

    exchanges: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("gram",)

    def __post_init__(self) -> None:
        if self.swaps < 1 or self.candidates < 1:
            raise InvalidInput("sparse_swaps: at least one of swaps, and at least one of candidates")

    def solve(self, weight: Tensor, statistics: Statistics, choose: Choose) -> tuple[Tensor, Tensor]:
        """See `Solver.solve`."""
        rows, columns = weight.shape
        keep = choose(weight.float(), slice(0, columns)).clone()
        width, gram = choose.exchange_width(columns), statistics.gram
        size = max(LARGEST_TABLE // (columns * min(width, self.candidates)), 1)
        for start in range(0, rows if columns >= width else 0, size):
            part = Exchanges(weight[start : start + size].float(), keep[start : start + size], gram, width)
            part.improve(self.swaps, self.candidates)
        return zeroed(weight.float(), keep), keep
