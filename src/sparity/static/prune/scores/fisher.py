"""Fisher: the loss's curvature by squared gradients (Theis et al. 2018, arXiv:1801.05787; Molchanov et al. 2019)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.calibration import Statistics
from sparity.registry import register
from sparity.static.prune.scores.base import Score


@register("prune.score", "fisher")
@dataclass(frozen=True)
class Fisher(Score):
    """w^2 E[g^2] / 2: the second-order change of the loss at a minimum. Scores compare within a layer.

    E[g^2], the mean over calibration sequences of the squared gradient, stands for the diagonal of the Hessian.
    """

    needs: ClassVar[tuple[str, ...]] = ("gradient_square",)

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` [out, in] -> importance [out, in], float32, higher is kept."""
        return weight.float().square() * statistics.gradient_square / 2
