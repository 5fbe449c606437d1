"""RMS: one threshold as a multiple of each token's own size, where tokens differ in size."""

from dataclasses import dataclass

from sparity.dynamic.activations.methods.base import RuleMethod, Seen
from sparity.dynamic.activations.methods.thresholds import Thresholds
from sparity.dynamic.activations.quantiles import quantile
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.registry import register

AFTER_NORM = frozenset({"q", "k", "v", "gate", "up", "fc1"})  # their inputs have about the same rms for every token


@register("activations.method", "rms")
@dataclass(frozen=True)
class Rms(RuleMethod):
    """Channel i of a token counts where |x_i| > c rms(x), c the quantile of |x_i| / rms(x) over calibration tokens.

    The inputs of q, k, v, gate, up and fc1 come from a normalisation and get one threshold for all tokens.
    """

    def rule(self, seen: Seen, sparsity: float) -> SkipRule:
        """See `RuleMethod.rule`."""
        if seen.roles and seen.partner is None and AFTER_NORM.issuperset(seen.roles):
            return SkipRule(quantile(seen.values.abs(), sparsity))
        return Thresholds(limit="rms").rule(seen, sparsity)
