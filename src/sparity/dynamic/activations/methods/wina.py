"""WINA: for each token the channels of largest magnitude times column norm (Chen et al. 2025, arXiv:2505.19427)."""

from dataclasses import dataclass

import torch

from sparity.dynamic.activations.methods.base import RuleMethod, Seen
from sparity.dynamic.activations.quantiles import ROUNDING, divided
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.registry import register

WEIGHED = frozenset({"k", "gate"})  # the roles for which the authors' code takes norms


@register("activations.method", "wina")
@dataclass(frozen=True)
class Wina(RuleMethod):
    """The k = int(in (1 - s)) channels of a token with the largest |x_i| ||W[:, i]|| count.

    Attributes:
        reference: as the authors' code: norms for matrices that hold k or gate (and where the role is not known), 1 for
            all others, and k rounded as Python's float does.
    """

    reference: bool = False

    def rule(self, seen: Seen, sparsity: float) -> SkipRule:
        """See `RuleMethod.rule`."""
        plain = self.reference and seen.roles and not WEIGHED & set(seen.roles)
        norms = torch.ones((), device=seen.values.device) if plain else seen.column_norms
        kept = seen.values.shape[-1] * (1 - sparsity)
        count = max(int(kept if self.reference else kept + ROUNDING), 1)
        return SkipRule(divided(torch.ones_like(norms), norms), scale="top", kept=count)
