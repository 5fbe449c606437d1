"""LLM Surgeon: the loss that a weight costs by a Kronecker-factored Fisher (van der Ouderaa et al. 2024).

arXiv:2312.17244. In the solver of this name the same costs choose the mask, and the weights that stay are updated.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.calibration import Statistics
from sparity.calibration.statistics import DAMPING
from sparity.registry import register
from sparity.static.prune.kronecker_quadratic import OUTPUT_DAMPING, STATISTICS, KroneckerQuadratic, check_dampings
from sparity.static.prune.scores.base import Score


@register("prune.score", "llm_surgeon")
@dataclass(frozen=True)
class LLMSurgeonCost(Score):
    """w^2 / (2 [G^-1]_ii [A^-1]_jj), in nats per token. Scores compare within a layer, and across layers.

    A is the mean of x xT over tokens, G that of g gT, g the gradient of the loss at the output; `damping` and
    `output_damping` are the shares of their mean diagonals that are added to them.
    """

    damping: float = DAMPING
    output_damping: float = OUTPUT_DAMPING

    needs: ClassVar[tuple[str, ...]] = STATISTICS

    def __post_init__(self) -> None:
        check_dampings(self.damping, self.output_damping)

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` [out, in] -> importance [out, in], float32, higher is kept."""
        return KroneckerQuadratic.of(statistics, self.damping, self.output_damping).costs(weight)
