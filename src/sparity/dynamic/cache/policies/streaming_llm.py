"""StreamingLLM: the first tokens and the last ones (Xiao et al. 2024, arXiv:2309.17453)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.seen import Seen
from sparity.registry import register


@register("cache.policy", "streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(Policy):
    """The first `sinks` tokens stay, and of the others the last.

    Attributes:
        sinks: tokens at the start that draw attention whatever they say.
        turn: count positions in the cache, as the authors' code does, not in the text; in a run.
    """

    sinks: int = 4
    turn: bool = False
    evicts_while_decoding: ClassVar[bool] = True

    @property
    def told(self) -> frozenset[str]:
        """See `Policy.told`."""
        return frozenset({"rotary"}) if self.turn else frozenset()

    @property
    def turns(self) -> bool:
        """See `Policy.turns`."""
        return self.turn

    def protected(self, budget: int) -> tuple[int, int]:
        """See `Policy.protected`."""
        return self.sinks, 0

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`: a token's place among those that are held, from 0 to 1."""
        places = torch.linspace(0, 1, seen.tokens, device=seen.keys.device)
        scores = places.expand(seen.keys.shape[:3]).clone()
        scores[..., : self.sinks] = 1
        return scores
