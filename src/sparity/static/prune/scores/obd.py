"""OBD: the layer's squared error when a weight goes and no other adapts (LeCun, Denker, Solla 1990)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.calibration import Statistics
from sparity.registry import register
from sparity.static.prune.scores.base import Score


@register("prune.score", "obd")
@dataclass(frozen=True)
class OBD(Score):
    """H_jj w^2 / 2, with H the Hessian of the layer's squared error. Scores compare within a layer.

    Only the diagonal is read: H_jj = 2 sum(x_j^2) / sequences, so the score is Wanda's, squared.
    """

    needs: ClassVar[tuple[str, ...]] = ("column_norm",)

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` [out, in] -> importance [out, in], float32, higher is kept."""
        hessian_diagonal = 2 * statistics.column_norm.square()  # [in]
        return hessian_diagonal * weight.float().square() / 2
