"""CATS: the gate's activations against a quantile of their magnitude (Lee et al. 2024, arXiv:2404.08763)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.activations.methods.base import RuleMethod, Seen
from sparity.dynamic.activations.places import Where
from sparity.dynamic.activations.quantiles import interpolated_quantile, just_below
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.registry import register

EDGES, REACH = 19_998, 2.0  # of the authors' histogram, between its two infinite ones


@register("activations.method", "cats")
@dataclass(frozen=True)
class Cats(RuleMethod):
    """Neuron i counts where |act(gate_i)| >= t, the quantile over all neurons and calibration tokens of a layer.

    The gate is computed in full; rows of up and columns of down are skipped.

    Attributes:
        reference: take t from the authors' histogram, bins of equal width within [-2, 2] and one at either end: the
            lower edge of the bin that the quantile lies in.
    """

    reference: bool = False
    where: ClassVar[Where] = "gate_output"

    def rule(self, seen: Seen, sparsity: float) -> SkipRule:
        """See `RuleMethod.rule`."""
        sizes = seen.values.abs()
        limit = edge_below(sizes, sparsity) if self.reference else interpolated_quantile(sizes, sparsity)
        return SkipRule(just_below(limit))


def edge_below(sizes: Tensor, share: float) -> Tensor:
    """The lower edge, `[]`, of the bin in which a share of the numbers is passed; 2 for all that is larger."""
    infinite = torch.tensor([torch.inf])
    edges = torch.cat([-infinite, torch.linspace(-REACH, REACH, EDGES), infinite])
    counts = torch.histogram(sizes.flatten().cpu(), edges).hist
    passed = torch.searchsorted((counts / counts.sum()).cumsum(0), share, side="right")
    return edges[passed.clamp_max(EDGES)]
