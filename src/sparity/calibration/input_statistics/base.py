"""What a statistic of inputs is: a raw sum that merges, and what it stands for."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from sparity import registry


class Statistic(ABC):
    """What calibration learns about the inputs `[tokens, in]` of a projection.

    Scores, solvers and budgets name it in `needs`. By default its raw sum is float32 `[in]`, one number per input
    channel, and two of them merge by adding them up.
    """

    name: ClassVar[str]
    stored_as: ClassVar[str | None] = None  # what files call the raw sum; None is the statistic's name

    def empty(self, columns: int, device: torch.device | str) -> Tensor:
        """The raw sum over no inputs of `columns` channels."""
        return torch.zeros(columns, device=device)

    @abstractmethod
    def add(self, total: Tensor, x: Tensor) -> None:
        """Count inputs `[tokens, in]`, float32, in place."""

    def merge(self, total: Tensor, other: Tensor) -> Tensor:
        """The raw sum of two halves of the inputs, a new tensor."""
        return total + other

    @property
    def adds_up(self) -> bool:
        """Whether merging is adding, so that many raw sums can be added in float64 and rounded once."""
        return type(self).merge is Statistic.merge

    def is_finite(self, total: Tensor) -> bool:
        """Whether all inputs were finite, and not too large to be counted."""
        return bool(torch.isfinite(total).all())

    def is_silent(self, total: Tensor) -> bool:
        """Whether it is certain that all inputs were zero, or too small to be counted; not every statistic can tell."""
        return False

    @abstractmethod
    def value(self, total: Tensor, sequences: int, tokens: int) -> Tensor:
        """What the raw sum over so many sequences and tokens stands for.

        It may be `total` itself, made ready in place where `add` does not look; it is then not asked for again until
        more inputs come.
        """

    def stored(self, total: Tensor) -> dict[str, Tensor]:
        """The tensors that a file keeps of a raw sum, by what follows the site in their keys; "" is the site alone."""
        return {"": total}

    def restore(self, part: Callable[[str], Tensor], columns: int) -> Tensor:
        """The raw sum again, from `part`, which reads a tensor of `stored` by its name."""
        return part("")

    def nbytes(self, columns: int) -> int:
        """The bytes of what a file keeps of inputs of `columns` channels."""
        return sum(part.nbytes for part in self.stored(self.empty(columns, "meta")).values())


def statistic(name: str) -> Statistic:
    """The statistic of this name.

    Raises:
        InvalidInput: there is none; the message suggests the nearest one.
    """
    found: Statistic = registry.get("statistic", name)()
    return found
