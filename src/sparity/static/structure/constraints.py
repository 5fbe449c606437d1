"""Masks over the parts of a model that are to become a given number, and the Lagrangian that sees to it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.dimensions import CHANNELS, DEPTH, HIDDEN, KV_GROUPS, QUERY_HEADS
from sparity.static.structure.hard_concrete import LIMIT, draw, probability, settled
from sparity.static.structure.ranked import ranked_sizes


class Constraint(Protocol):
    """What masks are to come to; its multipliers `[]` climb while everything else descends."""

    linear: nn.Parameter
    squared: nn.Parameter

    def lagrangian(self, grown: float) -> Tensor:
        """What the loss gains by it, `[]`; `grown` is the share of the target so far."""


@dataclass
class Axis:
    """The units of one dimension, in rows of which each is to keep equally many.

    Attributes:
        name: the dimension.
        rows: the blocks; the blocks' groups, for query heads that share keys; one for what the whole model shares.
        size: units per row.
        left: how many of each row are to stay.
        log_alpha: `[rows, size]`, where a mask lies: high for one that is nearly always 1.
        linear, squared: the multipliers `[]` of the constraint, which climb while everything else descends.
    """

    name: str
    rows: int
    size: int
    left: int
    log_alpha: nn.Parameter = field(init=False, repr=False)
    linear: nn.Parameter = field(init=False, repr=False)
    squared: nn.Parameter = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.log_alpha = nn.Parameter(torch.full((self.rows, self.size), LIMIT))
        self.linear, self.squared = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    @property
    def shared(self) -> bool:
        """Whether its units are the model's, not each block's own."""
        return self.name in (DEPTH, HIDDEN)

    @property
    def sparsity(self) -> Tensor:
        """The share of each row that is expected to be 0, `[rows]`."""
        return 1 - probability(self.log_alpha).sum(-1) / self.size

    def lagrangian(self, grown: float) -> Tensor:
        """linear (s - t) + squared (s - t)^2, `[]`, the mean over rows; `grown` is the share of the target t so far."""
        miss = self.sparsity - grown * (1 - self.left / self.size)
        return (self.linear * miss + self.squared * miss.square()).mean()

    def draw(self, generator: torch.Generator) -> Tensor:
        """Masks at random, `[rows, size]`."""
        return draw(self.log_alpha, torch.rand(self.rows, self.size, generator=generator))

    def settle(self) -> Tensor:
        """Masks without chance, `[rows, size]`: exactly `left` of each row are not 0."""
        return settled(self.log_alpha.detach(), self.left)

    def kept(self, blocks: int) -> Any:
        """The units that stay, as `sparity.cut` takes them: of the model, or for each of its blocks."""
        mask = self.settle()
        units = [row.nonzero().flatten().tolist() for row in (mask if self.shared else mask.view(blocks, -1))]
        return units[0] if self.shared else units

    def scores(self, blocks: int) -> Tensor:
        """log alpha of every unit, `[blocks, units]`, of the depth `[blocks]`."""
        values = self.log_alpha.detach().clone()
        if self.name == DEPTH:
            return values[0]
        return values.expand(blocks, -1).clone() if self.shared else values.view(blocks, -1)

    def clamp(self) -> None:
        """Keep `log_alpha` where its gradients do not vanish."""
        self.log_alpha.data.clamp_(-LIMIT, LIMIT)


def lagrangian(constraints: Iterable[Constraint], grown: float) -> Tensor:
    """The sum over constraints, `[]`."""
    return torch.stack([constraint.lagrangian(grown) for constraint in constraints]).sum()


def full_sizes(decoder: Decoder) -> dict[str, int]:
    """Dimension -> how many units every block, or the model, has.

    Raises:
        InvalidInput: a model with experts.
    """
    if any(decoder.family.experts(decoder.config, index) for index in range(len(decoder))):
        raise InvalidInput("masks have no rule for experts: use reap, or minitron")
    sizes = {dimension.name: dimension.size for dimension in decoder.dimensions(0)}
    if KV_GROUPS in sizes:
        sizes[QUERY_HEADS] = int(decoder.config.num_attention_heads)
    return {**sizes, HIDDEN: int(decoder.config.hidden_size), DEPTH: len(decoder)}


def part_sizes(decoder: Decoder, sparsity: float) -> dict[str, int]:
    """How many channels, and heads with the keys that they share, stay in every block when a share of both goes.

    Raises:
        InvalidInput: a model with experts.
    """
    heads = [name for name in full_sizes(decoder) if name in (KV_GROUPS, QUERY_HEADS)][:1]
    return {name: ranked_sizes(name, decoder, sparsity)[name] for name in (CHANNELS, *heads)}


def axes_of(decoder: Decoder, wanted: Mapping[str, int]) -> list[Axis]:
    """An axis for each dimension that is to become smaller; of query heads that share keys a row for each group."""
    full, axes = full_sizes(decoder), []
    for name, left in wanted.items():
        groups = full.get(KV_GROUPS, 1) if name == QUERY_HEADS else 1
        rows = 1 if name in (DEPTH, HIDDEN) else len(decoder) * groups
        if left < full[name]:
            axes.append(Axis(name, rows, full[name] // groups, left // groups))
    return axes
