"""Keep all: the control that evicts nothing, whatever share is asked for."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.seen import Seen
from sparity.registry import register


@register("cache.policy", "keep_all")
@dataclass(frozen=True)
class KeepAll(Policy):
    """Every token stays."""

    counts: ClassVar[bool] = False

    def budget(self, tokens: int, keep: float, layer: int | None = None, layers: int | None = None) -> int:
        """See `Policy.budget`: all of them."""
        return tokens

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`: all alike."""
        return torch.ones(seen.keys.shape[:3], device=seen.keys.device)
