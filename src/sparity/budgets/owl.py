"""OWL: blocks with more outliers keep more (Yin et al. 2024, arXiv:2310.05175)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sparity.budgets.base import Budget, Objective, Site, shift_to_sparsity
from sparity.calibration import Statistics
from sparity.errors import InvalidInput
from sparity.registry import register


@register("budget", "owl")
@dataclass(frozen=True)
class OWL(Budget):
    """A site's outlier ratio is the share of |w| * norm above `outlier_multiple` times their mean.

    Ratios are stretched to [0, 2 * `max_shift`]; a site keeps that much more than one without outliers. With
    `per: block` all matrices of a block share one outlier ratio, counted over all of them, as in the reference code;
    with `per: layer` each matrix has its own. One pass over the dense model comes first.
    """

    outlier_multiple: float = 5.0
    max_shift: float = 0.08
    per: Literal["block", "layer"] = "block"

    needs: ClassVar[tuple[str, ...]] = ("column_norm",)

    def __post_init__(self) -> None:
        if self.outlier_multiple <= 0 or not 0 <= self.max_shift <= 0.5:
            raise InvalidInput(
                f"owl: outlier_multiple {self.outlier_multiple} must be positive and max_shift {self.max_shift} lie in "
                "[0, 0.5]"
            )

    def observe(self, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistics]) -> dict[str, float]:
        """The outlier ratio of each matrix, in percent."""
        sizes = {name: weight.abs().float() * statistics[name].column_norm for name, weight in weights.items()}
        if self.per == "layer":
            return {name: self._ratio([size]) for name, size in sizes.items()}
        return dict.fromkeys(sizes, self._ratio(list(sizes.values())))

    def _ratio(self, sizes: Sequence[Tensor]) -> float:
        count = sum(size.numel() for size in sizes)
        mean = sum(float(size.double().sum()) for size in sizes) / count
        outliers = sum(int((size > self.outlier_multiple * mean).sum()) for size in sizes)
        return 100 * outliers / count

    def allocate(self, sites: Sequence[Site], sparsity: float, objective: Objective | None = None) -> dict[str, float]:
        """See `Budget.allocate`."""
        ratios = [site.evidence for site in sites]
        span = (max(ratios) - min(ratios)) or 1.0
        return shift_to_sparsity(sites, [-2 * self.max_shift * (r - min(ratios)) / span for r in ratios], sparsity)
