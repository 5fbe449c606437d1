"""Magnitude: the norm of all weights that go with a part (Li et al. 2017, arXiv:1608.08710; arXiv:2301.12900)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.models import Block
from sparity.models.dimensions import DEPTH, EXPERTS, HIDDEN, hidden_dimension
from sparity.registry import register
from sparity.static.structure.ranked import Ranked
from sparity.static.structure.subject import Subject
from sparity.static.structure.units import over_cuts, stacked


@register("structure.method", "magnitude")
@dataclass(frozen=True)
class Magnitude(Ranked):
    """Score a part by the square root of the sum of all its squared weights, in every projection that it runs through.

    The control: it reads no text. A block's score is the norm of all its projections.
    """

    needs_text: ClassVar[bool] = False

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""
        found: dict[str, list[Tensor | None]] = {}
        depth, hidden = [], torch.zeros(int(subject.config.hidden_size))
        for block in subject.blocks():
            squares = {projection.name: projection.weight.float().square() for projection in block.projections}
            rows = {name: square.sum(1) for name, square in squares.items()}
            columns = {name: square.sum(0) for name, square in squares.items()}
            for dimension in subject.dimensions(block):
                score = torch.stack(over_cuts(dimension, rows, columns)).sum(0).sqrt()
                found.setdefault(dimension.name, [None] * subject.depth)[block.index] = score
            stream = hidden_dimension(block.projections, len(hidden))
            hidden += torch.stack(over_cuts(stream, rows, columns)).sum(0).cpu()
            experts = _experts(block, {name: float(square.sum()) for name, square in squares.items()})
            if experts is not None:
                found.setdefault(EXPERTS, [None] * subject.depth)[block.index] = experts
            depth.append(sum(float(square.sum()) for square in squares.values()) ** 0.5)
        for weight in {subject.model.get_input_embeddings().weight, subject.model.get_output_embeddings().weight}:  # type: ignore[operator]
            hidden += weight.detach().float().square().sum(0).cpu()
        shared = hidden.sqrt().expand(subject.depth, -1).clone()
        scores = {name: stacked(rows_) for name, rows_ in found.items()}
        return {**scores, HIDDEN: shared, DEPTH: torch.tensor(depth)}


def _experts(block: Block, sums: dict[str, float]) -> Tensor | None:
    """The norm of each expert."""
    found: dict[int, float] = {}
    for projection in block.projections:
        if projection.expert is not None:
            found[projection.expert] = found.get(projection.expert, 0.0) + sums[projection.name]
    return torch.tensor([found[expert] for expert in sorted(found)]).sqrt() if found else None
