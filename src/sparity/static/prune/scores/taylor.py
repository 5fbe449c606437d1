"""Taylor: the loss's change to second order when a weight goes (Molchanov et al. 2019, arXiv:1906.10771)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.calibration import Statistics
from sparity.registry import register
from sparity.static.prune.scores.base import Score


@register("prune.score", "taylor")
@dataclass(frozen=True)
class Taylor(Score):
    """|w g - w^2 E[g^2] / 2|: first- and second-order change of the loss. Scores compare within a layer.

    g is the mean gradient over calibration sequences, E[g^2] the mean of its squares in place of the Hessian.
    """

    needs: ClassVar[tuple[str, ...]] = ("gradient", "gradient_square")

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` [out, in] -> importance [out, in], float32, higher is kept."""
        w = weight.float()
        return (w * statistics.gradient - w.square() * statistics.gradient_square / 2).abs()
