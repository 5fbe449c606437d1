"""TEAL: magnitude against a quantile of calibration text (Liu et al. 2024, arXiv:2408.14690)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.dynamic.activations.methods.base import RuleMethod, Seen
from sparity.dynamic.activations.quantiles import quantile, threshold_for
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.errors import InvalidInput
from sparity.registry import register

BINS, TAIL = 10_000, 0.01  # of the authors' code, whose two outermost bins hold the tails


@register("activations.method", "teal")
@dataclass(frozen=True)
class Teal(RuleMethod):
    """Channel i counts where |x_i| > t, the quantile of |x| over all channels and calibration tokens of a projection.

    Attributes:
        reference: take the quantile 0.5 + s/2 of x from a histogram of 10,000 bins whose ends hold 1 % of the numbers
            each, as the authors' code does, which takes x to be symmetric around 0.
    """

    reference: bool = False

    @property
    def statistics(self) -> frozenset[str]:
        """See `Method.statistics`."""
        return frozenset({"inputs" if self.reference else "histogram"})

    def rule(self, seen: Seen, sparsity: float) -> SkipRule:
        """See `RuleMethod.rule`."""
        if not self.reference and seen.sample is not None:  # all of them
            return SkipRule(quantile(seen.values.abs(), sparsity))
        if not self.reference:
            return SkipRule(torch.tensor(threshold_for(seen.statistics, sparsity)[0]))
        values = seen.values.flatten().cpu()
        if len(values) < 1 / TAIL:
            raise InvalidInput(
                f"{seen.statistics.site}: teal with `reference` needs 100 numbers or more for its tails of 1 %, got "
                f"{len(values)}: give more tokens, or leave `reference` out"
            )
        return SkipRule(upper_quantile(values, 0.5 + sparsity / 2).clamp_min(0))


def upper_quantile(values: Tensor, share: float) -> Tensor:
    """The quantile of `values` [n], linear between the centres of the histogram's bins, in float32 throughout."""
    tail = int(TAIL * len(values))
    low, high = values.kthvalue(tail + 1).values, values.kthvalue(len(values) - tail + 1).values
    edges = torch.cat([values.min()[None], torch.linspace(low, high, BINS - 1), values.max()[None]])
    counts = torch.histogram(values, edges).hist
    centres, reached = (edges[:-1] + edges[1:]) / 2, counts.cumsum(0)
    wanted = share * counts.sum()
    found = int(torch.searchsorted(reached, wanted))
    if found in (0, BINS):
        return centres[min(found, BINS - 1)]
    way = (wanted - reached[found - 1]) / (reached[found] - reached[found - 1])
    return centres[found - 1] + way * (centres[found] - centres[found - 1])
