"""LagKV: tokens that differ from those that follow (Liang et al. 2025, arXiv:2504.04704)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.seen import Seen, cut
from sparity.registry import register


@register("cache.policy", "lagkv")
@dataclass(frozen=True)
class LagKV(Policy):
    """Keys and values of a stretch of tokens are measured by the range of the next one; where they spread, they stay.

    Attributes:
        sinks: tokens at the start that stay.
        lag: tokens of a stretch; the last whole one and what follows it stay.
        ranks: compare tokens within their stretch only, by rank; without, also between stretches.
    """

    sinks: int = 4
    lag: int = 128
    ranks: bool = True

    @property
    def least(self) -> int:
        """See `Policy.least`."""
        return self.lag

    def protected(self, budget: int) -> tuple[int, int]:
        """See `Policy.protected`."""
        return self.sinks, 0

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`: from 0 to 1. A text of less than two stretches goes by its order, the last stay."""
        stretches = (seen.tokens - self.sinks) // self.lag
        scores = torch.ones(seen.keys.shape[:3], device=seen.keys.device)
        if stretches < 2:
            inner = max(seen.tokens - self.sinks, 0)
            scores[..., self.sinks :] = torch.arange(inner, device=scores.device) / max(inner, 1)
            return scores
        end = self.sinks + stretches * self.lag
        spread = (
            self._spread(seen.keys[:, :, self.sinks : end]) + self._spread(seen.values[:, :, self.sinks : end])
        ) / 2
        if self.ranks:
            spread = spread.argsort(dim=-1, stable=True).argsort(-1) / self.lag
        scores[..., self.sinks : end - self.lag] = spread.flatten(2)
        return scores

    def _spread(self, states: Tensor) -> Tensor:
        """`states` [batch, kv_heads, stretches * lag, width] -> `[batch, kv_heads, stretches - 1, lag]`, sum 1 each."""
        pieces = cut(states.float(), 2, self.lag)
        low, high = pieces[:, :, 1:].amin(-2, keepdim=True), pieces[:, :, 1:].amax(-2, keepdim=True)
        extent = (high - low).where(high > low, 1)
        spread: Tensor = ((pieces[:, :, :-1] - low) / extent).std(-1).softmax(-1)
        return spread
