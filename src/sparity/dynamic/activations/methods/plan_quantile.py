"""Plan, strategy 1: for each token the channels at or above a quantile of its own magnitudes."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparity.dynamic.activations.methods.base import RuleMethod, Seen
from sparity.dynamic.activations.places import Where
from sparity.dynamic.activations.quantiles import ROUNDING
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.registry import register


@register("activations.method", "plan_quantile")
@dataclass(frozen=True)
class PlanQuantile(RuleMethod):
    """Channel i of a token counts where |h_i| is at or above the s-quantile of the token's |h|, linearly interpolated.

    That is a fixed number of channels per token; of equal ones at the limit the first count.
    """

    where: ClassVar[Where] = "hidden"

    def rule(self, seen: Seen, sparsity: float) -> SkipRule:
        """See `RuleMethod.rule`."""
        kept = at_or_above(seen.values.shape[-1], sparsity)
        return SkipRule(torch.ones((), device=seen.values.device), scale="top", kept=kept)


def at_or_above(channels: int, sparsity: float) -> int:
    """How many of so many different numbers lie at or above their interpolated quantile."""
    return channels - math.ceil(sparsity * (channels - 1) - ROUNDING)
