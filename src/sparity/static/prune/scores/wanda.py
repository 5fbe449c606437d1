"""Wanda: weight magnitude times input norm (Sun et al. 2024, arXiv:2306.11695)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.calibration import Statistics
from sparity.registry import register
from sparity.static.prune.compare_within import CompareWithin
from sparity.static.prune.scores.base import Score


@register("prune.score", "wanda")
@dataclass(frozen=True)
class Wanda(Score):
    """Score a weight by how much its product with a typical input moves the output.

    One forward pass over calibration text, no gradients. Scores compare within an output row.
    """

    needs: ClassVar[tuple[str, ...]] = ("column_norm",)
    compare_within: ClassVar[CompareWithin] = "row"

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` [out, in] -> importance [out, in], float32, higher is kept."""
        return weight.abs().float() * statistics.column_norm  # [in], broadcast over rows
