"""KVzip: what the model looks at when it says the text again (Kim et al. 2025, arXiv:2505.23416)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparity.dynamic.cache.policies.adakv import shared
from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.reconstruction import looked_at
from sparity.dynamic.cache.seen import Seen
from sparity.registry import register


@register("cache.policy", "kvzip")
@dataclass(frozen=True)
class KVzip(Policy):
    """A token's score is the largest weight that any query pays it while the model reads the text a second time.

    An oracle: after a prompt the model reads it again, with the prompt in its cache, and forgets that reading.

    Attributes:
        chunk: tokens that are read again at a time; weights are shares among the first tokens, these, and the reading.
        lead: the last tokens of the chunk before, which are read before a chunk.
        request: token ids that are read before every chunk, such as those of "Repeat the previous context exactly".
        sinks: tokens at the start that stay, and that every chunk sees.
        across: heads of the whole `model` share one budget, or those of a `layer`.
        plus: weigh by the size of the projected value over that of the query's hidden state (KVzip+).
    """

    chunk: int = 2048
    lead: int = 8
    request: tuple[int, ...] = ()
    sinks: int = 4
    across: Literal["model", "layer"] = "model"
    plus: bool = False
    ragged: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    rereads: ClassVar[bool] = True

    @property
    def told(self) -> frozenset[str]:
        """See `Policy.told`."""
        return frozenset({"output_weight", "hidden"}) if self.plus else frozenset()

    def protected(self, budget: int) -> tuple[int, int]:
        """See `Policy.protected`."""
        return self.sinks, 0

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`: the largest weight that the queries pay, those of a second reading or any."""
        scores = looked_at(seen, self.plus)
        scores[..., : self.sinks] = torch.maximum(scores[..., : self.sinks], scores.amax(-1, keepdim=True))
        return scores

    def select(self, seen: Seen, budget: int, protected: Tensor) -> Tensor:
        """See `Policy.select`."""
        return shared(self.score(seen), budget, protected, seen.present, 0.0)
