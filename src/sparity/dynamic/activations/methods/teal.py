"""TEAL: magnitude against a quantile of calibration text (Liu et al. 2024, arXiv:2408.14690)."""

import math
from dataclasses import dataclass

import torch

from sparity.dynamic.activations.methods.base import RuleMethod, Seen
from sparity.dynamic.activations.methods.thresholds import threshold_for
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.registry import register

BINS, TAIL = 10_000, 0.01  # of the reference: its outermost bins hold the tails


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
        if not self.reference:
            return SkipRule(torch.tensor(threshold_for(seen.statistics, sparsity)[0]))
        values = seen.values.flatten()
        low, high = (float(values.kthvalue(max(math.ceil(q * len(values)), 1)).values) for q in (TAIL, 1 - TAIL))
        counts = torch.histc(values.clamp(low, high).double(), BINS, low, high)
        reached = counts.cumsum(0) / counts.sum()
        bin_ = int(torch.searchsorted(reached, 0.5 + sparsity / 2))
        centre = low + (min(bin_, BINS - 1) + 0.5) * (high - low) / BINS
        return SkipRule(torch.tensor(max(centre, 0.0)))
