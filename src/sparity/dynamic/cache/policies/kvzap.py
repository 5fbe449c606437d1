"""KVzap: a linear gate that foretells KVzip's scores from hidden states (Jegou & Jeblick 2026, arXiv:2601.07891)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.cache.gates import fitted_gates
from sparity.dynamic.cache.learned import Learned, Study
from sparity.dynamic.cache.policies.adakv import shared
from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.seen import Seen
from sparity.registry import register


@register("cache.policy", "kvzap")
@dataclass(frozen=True)
class KVzap(Policy):
    """A token is scored once, when it is new: a linear function of what the projection of keys reads, for each head.

    Attributes:
        window: of the last tokens, which stay.
        threshold: tokens that score as much stay, however many; None = as many as are asked for, in the whole layer.
        ridge: the penalty on the squares of a gate's weights, where it is fitted.
    """

    window: int = 128
    threshold: float | None = None
    ridge: float = 1.0
    ragged: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    evicts_while_decoding: ClassVar[bool] = True
    learns: ClassVar[frozenset[str]] = frozenset({"gate"})
    reads_text: ClassVar[bool] = True

    @property
    def told(self) -> frozenset[str]:
        """See `Policy.told`."""
        return frozenset({"hidden"})

    def learn(self, study: Study) -> Learned:
        """See `Policy.learn`."""
        return [{"gate": gate} for gate in fitted_gates(study, self.ridge)]

    def protected(self, budget: int) -> tuple[int, int]:
        """See `Policy.protected`."""
        return 0, self.window

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`: the logarithm of KVzip+'s, foretold; of tokens before `seen.hidden` what they had."""
        kept = torch.zeros(seen.keys.shape[:3], device=seen.keys.device) if seen.mass is None else seen.mass.float()
        if seen.hidden is None or not seen.hidden.shape[1]:
            return kept
        gate = seen.learned["gate"].to(kept.device)
        scores = (seen.hidden.float() @ gate[:, :-1].T + gate[:, -1]).transpose(1, 2)  # [batch, kv_heads, new]
        return torch.cat([kept[..., : seen.tokens - scores.shape[-1]], scores], -1)

    def select(self, seen: Seen, budget: int, protected: Tensor) -> Tensor:
        """See `Policy.select`."""
        scores = self.score(seen)
        found = shared(scores, budget, protected, seen.present, 0.0)
        if self.threshold is not None:
            found = found | (scores >= self.threshold)
        return found if seen.present is None else found & seen.present
