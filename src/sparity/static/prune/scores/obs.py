"""OBS: the loss that removing a weight costs when all others may adapt (Hassibi & Stork 1993).

In SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774) the solver applies it block by block to weights that have
already been compensated; this file is the score of the untouched layer.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.calibration.statistics import DAMPING
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.scores.base import Score


@register("prune.score", "obs")
@dataclass(frozen=True)
class OBS(Score):
    """w^2 / (2 [H^-1]_jj), with H the damped Hessian of the layer's squared error. Scores compare within a layer.

    `damping` is the share of H's mean diagonal that is added to it.
    """

    damping: float = DAMPING

    needs: ClassVar[tuple[str, ...]] = ("gram",)

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise InvalidInput(f"damping {self.damping}: it must lie in [0, 1]")

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` [out, in] -> importance [out, in], float32, higher is kept."""
        factor, dead = statistics.inverse_factor(self.damping)  # [in, in], [in]
        inverse_diagonal = factor.square().sum(0)  # of UT U
        scores = weight.float().square() / (2 * inverse_diagonal)
        return torch.where(dead, 0.0, scores)
