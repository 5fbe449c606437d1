"""Expected attention: what queries to come will pay, from those that came (Devoto et al. 2025, arXiv:2510.00636)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.rotary import Rotary, turned
from sparity.dynamic.cache.seen import Seen
from sparity.registry import register


@register("cache.policy", "expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Queries to come are taken for normally distributed like those before, at the mean of the next positions.

    Attributes:
        sinks: tokens at the start that stay, and whose queries are not counted.
        future: positions ahead over which rotations are averaged.
        covariance: count the spread of the queries too.
        value_norm: multiply by the norm of the value.
        epsilon: added before that.
        base: of rotary positions, where the model does not say; 0 = queries are not turned.
    """

    sinks: int = 4
    future: int = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    base: float = 10000.0

    @property
    def told(self) -> frozenset[str]:
        """See `Policy.told`."""
        return frozenset({"rotary"})

    def protected(self, budget: int) -> tuple[int, int]:
        """See `Policy.protected`."""
        return self.sinks, 0

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`."""
        mean, spread = self._queries(seen)
        keys, scale = seen.keys.float()[:, :, None, self.sinks :], seen.scaling
        logits = (keys @ mean[..., None])[..., 0] * scale  # [batch, kv_heads, group, tokens]
        if spread is not None:
            logits = logits + ((keys @ spread) * keys).sum(-1) * (scale**2 / 2)
        scores = logits.softmax(-1).mean(2)
        if self.value_norm:
            scores = (scores + self.epsilon) * seen.values[:, :, self.sinks :].float().norm(dim=-1)
        full = torch.zeros(seen.keys.shape[:3], device=scores.device)
        full[..., self.sinks :] = scores
        full[..., : self.sinks] = scores.amax(-1, keepdim=True) if scores.shape[-1] else 0
        return full

    def _queries(self, seen: Seen) -> tuple[Tensor, Tensor | None]:
        """Mean `[batch, kv_heads, group, width]` and covariance `[..., width, width]` of the queries to come."""
        new, end = seen.queries.shape[2], seen.tokens if seen.length is None else seen.length
        places = torch.arange(end - new, end, device=seen.keys.device)
        counted = places >= self.sinks
        queries = seen.grouped[..., counted if bool(counted.any()) else slice(None), :]
        places = places[counted] if bool(counted.any()) else places
        rotary = seen.rotary or (Rotary.of_base(self.base, queries.shape[-1]) if self.base else None)
        if rotary is not None:
            cosine, sine = rotary.tables(torch.arange(end, end + self.future, device=queries.device))
            cosine, sine = cosine.mean(0), sine.mean(0)
            queries = rotary.turn(queries, -places)
        mean = queries.mean(-2)
        centred = queries - mean[..., None, :]
        spread = centred.transpose(-1, -2) @ centred / centred.shape[-2] if self.covariance else None
        if rotary is not None:
            mean = turned(mean, cosine, sine)
            if spread is not None:
                spread = turned(turned(spread, cosine, sine).transpose(-1, -2), cosine, sine)
        return mean, spread
