"""What a solver is."""

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sparity.calibration import Statistics


class Choose(Protocol):
    """How a solver asks the stage which weights of some columns are kept."""

    @property
    def column_step(self) -> int | None:
        """The width of the groups of columns that must be chosen together, or None for as many as there are."""

    @property
    def column_multiple(self) -> int:
        """Column blocks must be a multiple of this."""

    def __call__(self, scores: Tensor, columns: slice) -> Tensor:
        """Scores `[out, width]` of the columns -> bool `[out, width]`, True where the weight is kept."""


class Solver(ABC):
    """How the weights that stay make up for those that go.

    `needs` names the statistics it reads; `own_score` is the score with which its paper chooses the mask, computed by
    the solver itself on the weights as they are at that moment.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    own_score: ClassVar[str | None] = None

    @abstractmethod
    def solve(self, weight: Tensor, statistics: Statistics, choose: Choose) -> tuple[Tensor, Tensor]:
        """`weight` [out, in] -> new weight [out, in] in float32, and its mask, bool [out, in], True = kept."""


def zeroed(weight: Tensor, keep: Tensor) -> Tensor:
    """`weight` with +0 wherever `keep` is False."""
    return torch.where(keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
