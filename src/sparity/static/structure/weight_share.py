"""One constraint on the masks of a whole model: how large a share of its weights they are to make 0."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from sparity.static.structure.competition import Part, cheapest, unit_weights
from sparity.static.structure.constraints import Axis
from sparity.static.structure.hard_concrete import probability
from sparity.static.structure.methods.base import Choice
from sparity.static.structure.subject import Subject


@dataclass
class WeightShare:
    """The units of all axes compete for one share: no block has a number of its own to keep.

    Attributes:
        axes: what is masked, a row for each block.
        parts: axis -> its units in every block.
        target: the share of the weights of all units that is to go.
        linear, squared: the multipliers `[]` of the constraint, which climb while everything else descends.
    """

    axes: Sequence[Axis]
    parts: Mapping[str, Sequence[Part]]
    target: float
    linear: nn.Parameter = field(init=False, repr=False)
    squared: nn.Parameter = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.linear, self.squared = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    @property
    def sparsity(self) -> Tensor:
        """The share of the weights that is expected to be 0, `[]`."""
        total = sum(part.weights * len(part.costs) for found in self.parts.values() for part in found)
        closed = []
        for axis in self.axes:
            each = torch.tensor([part.weights / total for part in self.parts[axis.name]])
            closed.append((each * (1 - probability(axis.log_alpha)).sum(-1)).sum())
        return torch.stack(closed).sum()

    def lagrangian(self, grown: float) -> Tensor:
        """linear (s - t) + squared (s - t)^2, `[]`; `grown` is the share of the target t so far."""
        miss = self.sparsity - grown * self.target
        return self.linear * miss + self.squared * miss.square()

    def kept(self) -> Choice:
        """Dimension -> the units of every block that stay when those of lowest log alpha make up the target."""
        ranked = {}
        for axis in self.axes:
            rows = axis.log_alpha.detach().double()  # times whole numbers, and divided by them, they stay what they are
            ranked[axis.name] = [
                replace(part, costs=row * part.weights) for part, row in zip(self.parts[axis.name], rows, strict=True)
            ]
        dense = {name: [len(part.costs) for part in found] for name, found in ranked.items()}
        left = cheapest(ranked, dense, self.target)
        return {name: [units.tolist() for units in rows] for name, rows in left.items()}


def parts_of(subject: Subject, names: Iterable[str]) -> dict[str, list[Part]]:
    """The units of some dimensions in every block of a model, all of no cost."""
    found: dict[str, list[Part]] = {name: [] for name in names}
    for block in subject.blocks():
        weights = {projection.name: projection.weight for projection in block.projections}
        for dimension in subject.dimensions(block):
            if dimension.name in found:
                cut = next(cut for cut in dimension.cuts if cut.axis == "columns")
                part = Part(cut, torch.zeros(dimension.size), unit_weights(dimension, weights))
                found[dimension.name].append(part)
    return found
