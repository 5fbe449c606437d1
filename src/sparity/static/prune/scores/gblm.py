"""GBLM: Wanda's score with the size of the loss's gradient added (Das et al. 2023, arXiv:2311.04902)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.calibration import Statistics
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.compare_within import CompareWithin
from sparity.static.prune.scores.base import Score


@register("prune.score", "gblm")
@dataclass(frozen=True)
class GBLM(Score):
    """(alpha * rms(g) + input norm) * |w|, with rms(g) = sqrt(E[g^2]). Scores compare within an output row.

    `alpha` weighs the gradient of the dense model's loss; 0 is Wanda.
    """

    alpha: float = 100.0

    needs: ClassVar[tuple[str, ...]] = ("column_norm", "gradient_square")
    compare_within: ClassVar[CompareWithin] = "row"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise InvalidInput(f"alpha {self.alpha}: the weight of the gradient must be finite and not negative")

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` [out, in] -> importance [out, in], float32, higher is kept."""
        size = self.alpha * statistics.gradient_square.sqrt() + statistics.column_norm  # [out, in]
        return size * weight.abs().float()
