"""KeyDiff: keys unlike the mean key stay (Park et al. 2025, arXiv:2504.15364)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.seen import Seen
from sparity.registry import register


@register("cache.policy", "keydiff")
@dataclass(frozen=True)
class KeyDiff(Policy):
    """A token's score is minus the cosine of its key and the mean of all normalised keys of its head."""

    evicts_while_decoding: ClassVar[bool] = True

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`."""
        keys = seen.keys.float()
        return -cosine_similarity(keys, normalize(keys, dim=-1).mean(2, keepdim=True), dim=-1)
