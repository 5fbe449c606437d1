"""Gradient: weight times the loss's gradient, as in SNIP (Lee et al. 2019, arXiv:1810.02340)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.calibration import Statistics
from sparity.registry import register
from sparity.static.prune.scores.base import Score


@register("prune.score", "gradient")
@dataclass(frozen=True)
class Gradient(Score):
    """|w g|: how much the loss changes, to first order, when the weight goes. Scores compare within a layer.

    g is the mean over calibration sequences of the gradient of the dense model's loss.
    """

    needs: ClassVar[tuple[str, ...]] = ("gradient",)

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` [out, in] -> importance [out, in], float32, higher is kept."""
        return (weight.float() * statistics.gradient).abs()
