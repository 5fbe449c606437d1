"""Minitron: importance from activations alone, for widths and depth (Muralidharan et al. 2024, arXiv:2407.14679)."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparity.calibration import Visit
from sparity.calibration.cosine import mean_cosine
from sparity.models import InputSite
from sparity.models.cuts.hidden import block_norms
from sparity.models.dimensions import DEPTH, EXPERTS, HIDDEN, Dimension
from sparity.registry import register
from sparity.static.structure.experts import routed_norms
from sparity.static.structure.ranked import Ranked
from sparity.static.structure.subject import Subject, run_watched
from sparity.static.structure.units import stacked


@register("structure.method", "minitron")
@dataclass(frozen=True)
class Minitron(Ranked):
    """Score a part by the mean magnitude of its activations in a sequence, joined by the L2 norm over sequences.

    Channels at the input of the last MLP projection; heads by the L2 norm of their channels before the output
    projection; the hidden size by the outputs of all norms of all blocks, summed; a block by one minus the cosine
    between its input and output; an expert by the mean norm of what it adds to its tokens.
    """

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""
        found: dict[str, list[Tensor | None]] = {}
        hidden, depth = torch.zeros(int(subject.config.hidden_size)), []
        for visit in subject.visits():
            index, before = visit.block.index, visit.hidden.clone()
            norms = [torch.zeros(len(hidden)) for _ in block_norms(visit.block, len(hidden))]
            experts = routed_norms(visit)
            inputs = _inputs(visit, norms)
            for dimension in subject.dimensions(visit.block):
                found.setdefault(dimension.name, [None] * subject.depth)[index] = _unit_scores(dimension, inputs)
            if experts is not None:
                found.setdefault(EXPERTS, [None] * subject.depth)[index] = experts.mean_gated
            hidden += torch.stack(norms).sqrt().sum(0)
            depth.append(1 - mean_cosine(before, visit.hidden))
        shared = hidden.expand(subject.depth, -1).clone()
        return {**{name: stacked(rows) for name, rows in found.items()}, HIDDEN: shared, DEPTH: torch.tensor(depth)}


def _inputs(visit: Visit, norms: list[Tensor]) -> dict[str, Tensor]:
    """Projection -> sum over sequences of the squared mean size of each input channel; those of norms' outputs too."""
    sums: dict[str, Tensor] = {}

    def see(site: InputSite, x: Tensor) -> None:
        square = _mean_size(x).square()
        for projection in site.projections:
            sums[projection.name] = sums.get(projection.name, 0) + square

    with ExitStack() as watching:
        for total, norm in zip(norms, block_norms(visit.block, len(norms[0]) if norms else 0), strict=True):

            def after(module: nn.Module, given: object, output: Tensor, total: Tensor = total) -> None:
                total.add_(_mean_size(output.flatten(0, -2)).square())

            handle = norm.register_forward_hook(after)
            watching.callback(handle.remove)
        run_watched(visit, ("o", "down", "fc2"), see)
    return sums


def _mean_size(x: Tensor) -> Tensor:
    """The mean magnitude of each channel over the tokens of a sequence, `[tokens, channels]` -> `[channels]`."""
    return x.float().abs().sum(0).cpu() / max(len(x), 1)


def _unit_scores(dimension: Dimension, sums: dict[str, Tensor]) -> Tensor:
    """The L2 norm over sequences, and over the channels of each unit."""
    cut = next(cut for cut in dimension.cuts if cut.axis == "columns")
    return sums[cut.projection].view(-1, cut.width).sum(1).sqrt()
