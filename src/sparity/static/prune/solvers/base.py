"""What a solver is."""

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.calibration.statistics import WEAKEST
from sparity.static.prune.compare_within import CompareWithin


class Choose(Protocol):
    """How a solver asks the stage which weights of some columns are kept."""

    @property
    def column_step(self) -> int | None:
        """The width of the groups of columns that must be chosen together, or None for as many as there are."""

    @property
    def column_multiple(self) -> int:
        """Column blocks must be a multiple of this."""

    @property
    def fixed(self) -> bool:
        """Whether the mask was chosen before, by a score that is not the solver's: scores then make no difference."""

    def exchange_width(self, columns: int) -> int:
        """A kept and a pruned weight of a row may change places within groups of so many columns."""

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
    by_rows: ClassVar[bool] = False  # whether all that it reads of the Gram matrix is its factor's rows, in their order
    exchanges: ClassVar[bool] = False  # whether kept and pruned weights change places, which not every pattern allows
    compare_within: ClassVar[CompareWithin | None] = None  # of its own scores; None is what the score of that name says

    @abstractmethod
    def solve(self, weight: Tensor, statistics: Statistics, choose: Choose) -> tuple[Tensor, Tensor]:
        """`weight` [out, in] -> new weight [out, in] in float32, and its mask, bool [out, in], True = kept."""


def zeroed(weight: Tensor, keep: Tensor) -> Tensor:
    """`weight` with +0 wherever `keep` is False."""
    return torch.where(keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def never_worse(weight: Tensor, solved: Tensor, keep: Tensor, gram: Tensor) -> Tensor:
    """`solved` [out, in], but zeroing alone in the rows whose output on calibration inputs that leaves closer.

    Weights that read channels which never fired are what they were.
    """
    plain = zeroed(weight, keep)
    solved = torch.where(gram.diagonal() < WEAKEST, plain, zeroed(solved, keep))
    errors = [((change @ gram) * change).sum(1) for change in (weight - solved, weight - plain)]
    return torch.where((errors[0] < errors[1])[:, None], solved, plain)
