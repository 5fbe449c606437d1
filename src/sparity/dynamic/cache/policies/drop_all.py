"""Drop all: the control that evicts every token that nothing protects, whatever share is asked for."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.seen import Seen
from sparity.registry import register


@register("cache.policy", "drop_all")
@dataclass(frozen=True)
class DropAll(Policy):
    """No token stays but the protected ones."""

    counts: ClassVar[bool] = False
    evicts_while_decoding: ClassVar[bool] = True

    def budget(self, tokens: int, keep: float, layer: int | None = None, layers: int | None = None) -> int:
        """See `Policy.budget`: none of them."""
        return 0

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`: all alike."""
        return torch.zeros(seen.keys.shape[:3], device=seen.keys.device)

    def select(self, seen: Seen, budget: int, protected: Tensor) -> Tensor:
        """See `Policy.select`."""
        return protected.clone()
