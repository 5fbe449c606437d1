"""TOVA: what the last token pays attention to, the same for all heads (Oren et al. 2024, arXiv:2401.06104)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.seen import Seen, with_window
from sparity.registry import register


@register("cache.policy", "tova")
@dataclass(frozen=True)
class Tova(Policy):
    """A token's score is the weight that the last query gives it, the mean over all heads; the last token stays."""

    evicts_while_decoding: ClassVar[bool] = True

    def protected(self, budget: int) -> tuple[int, int]:
        """See `Policy.protected`."""
        return 0, 1

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`."""
        new = seen.queries.shape[2]
        weights = seen.weights(new - 1, new)[..., 0, :-1].mean((1, 2))  # [batch, tokens before the last]
        return with_window(weights[:, None], seen.tokens).expand(seen.keys.shape[:3]).clone()
