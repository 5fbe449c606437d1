"""What a method of sparse training is, what it is given, and what methods with N:M zeros share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparity import registry
from sparity.models import Projection
from sparity.stages.kinds import Trained, Workspace
from sparity.training.fine_tune.steps import next_token_loss, places


@dataclass(frozen=True)
class Task:
    """A model that is to be trained and made sparse, in place.

    Attributes:
        model: a transformers causal language model.
        projections: all of its blocks.
        masks: projection -> bool `[out, in]`, False where a zero must stay; for every projection.
        dense: projections that get no zeros of this training.
        tokens: token ids `[samples, length]`.
        work: keeps what a killed training needs to go on with the same bits.
        steps: of one course of training.
        rate: AdamW's learning rate at the start.
        batch: sequences per step.
    """

    model: nn.Module
    projections: tuple[Projection, ...]
    masks: Mapping[str, Tensor]
    dense: frozenset[str]
    tokens: Tensor
    work: Workspace
    steps: int
    rate: float
    batch: int

    @property
    def chosen(self) -> tuple[Projection, ...]:
        """The projections that become sparse."""
        return tuple(projection for projection in self.projections if projection.name not in self.dense)

    def loss(self, step: int) -> Tensor:
        """The mean cross-entropy of the next token on the sequences of a step, `[]`."""
        return next_token_loss(self.model, self.tokens[places(step, self.batch, len(self.tokens))])

    def write_zeros(self, masks: Mapping[str, Tensor]) -> None:
        """Make every weight +0 whose mask is False."""
        for projection in self.projections:
            projection.weight.masked_fill_(~masks[projection.name], 0.0)


class Method(ABC):
    """A frozen dataclass whose fields are its options."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def pattern(self) -> Any:
        """The plug-in of `prune.pattern` in which its zeros lie."""

    @property
    @abstractmethod
    def share(self) -> float:
        """The share of a projection's weights that it makes zero, in [0, 1)."""

    @property
    def words(self) -> str:
        """The method in a few words."""
        return f"{self.name}, {self.pattern.words}"

    def total(self, steps: int) -> int:
        """All its steps, where one course of training has so many."""
        return steps

    def numbers(self, weights: int) -> float:
        """How many numbers it trains for so many weights."""
        return weights

    def declines(self, steps: int) -> str | None:
        """Why it cannot train for so many steps; None when it can."""
        return None

    @abstractmethod
    def train(self, task: Task) -> Trained:
        """Change the weights of `task.model` in place; zeros stay where `task.masks` is False."""


@dataclass(frozen=True)
class NOfMethod(Method):
    """A method whose zeros are N:M.

    Attributes:
        kept: weights kept of every group of neighbours in a row.
        of: neighbours in a group.
    """

    kept: int = 2
    of: int = 4

    def __post_init__(self) -> None:
        self.pattern  # noqa: B018 - refuses sizes that make no sense

    @property
    def pattern(self) -> Any:
        """See `Method.pattern`."""
        return registry.create("prune.pattern", "n_of_m", {"n": self.kept, "m": self.of})

    @property
    def share(self) -> float:
        """See `Method.share`."""
        return 1 - self.kept / self.of

    def largest(self, weight: Tensor, given: Tensor) -> Tensor:
        """bool like `weight` `[out, in]`: the `kept` largest of each group, as far as `given` lets them stay."""
        sizes = weight.detach().abs().float().masked_fill(~given, 0.0)
        keep: Tensor = self.pattern.keep(sizes, self.share, "layer")
        return torch.logical_and(keep, given)

    def largest_of(self, task: Task) -> dict[str, Tensor]:
        """Projection -> mask, True where a weight stays; what is to stay dense keeps its own zeros."""
        chosen = {
            projection.name: self.largest(projection.weight, task.masks[projection.name]) for projection in task.chosen
        }
        return {**task.masks, **chosen}
