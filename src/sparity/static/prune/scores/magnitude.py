"""Magnitude: the size of the weight itself (Han et al. 2015, arXiv:1506.02626)."""

from dataclasses import dataclass

from torch import Tensor

from sparity.calibration import Statistics
from sparity.registry import register
from sparity.static.prune.scores.base import Score


@register("prune.score", "magnitude")
@dataclass(frozen=True)
class Magnitude(Score):
    """Score a weight by its absolute value. Needs no calibration; scores compare within a layer."""

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` [out, in] -> importance [out, in], float32, higher is kept."""
        return weight.abs().float()
