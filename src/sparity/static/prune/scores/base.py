"""What a score is."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from sparity.calibration import Statistics
from sparity.static.prune.compare_within import CompareWithin


class Score(ABC):
    """How much each weight of a matrix matters.

    `needs` names the statistics that the score reads; `compare_within` is the group in which its scores compare by
    default: an output row or the whole layer.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    compare_within: ClassVar[CompareWithin] = "layer"

    @abstractmethod
    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` [out, in] -> importance [out, in], float32, higher is kept."""
