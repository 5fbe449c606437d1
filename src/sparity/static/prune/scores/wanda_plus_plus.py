"""Wanda++: Wanda's score with the gradient of the block's own output (Yang et al. 2025, arXiv:2503.04992)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.calibration import Statistics
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.compare_within import CompareWithin
from sparity.static.prune.scores.base import Score


@register("prune.score", "wanda_plus_plus")
@dataclass(frozen=True)
class WandaPlusPlus(Score):
    """(alpha * rms(g) + input norm) * |w|, g the gradient of ||block output||. Scores compare within an output row.

    `alpha` weighs the gradient; 0 is Wanda. The paper's rounds of optimising the block are the stage's option `rounds`.
    """

    alpha: float = 100.0

    needs: ClassVar[tuple[str, ...]] = ("column_norm", "regional_gradient_square")
    compare_within: ClassVar[CompareWithin] = "row"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise InvalidInput(f"alpha {self.alpha}: the weight of the gradient must be finite and not negative")

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` [out, in] -> importance [out, in], float32, higher is kept."""
        size = self.alpha * statistics.regional_gradient_square.sqrt() + statistics.column_norm  # [out, in]
        return size * weight.abs().float()
