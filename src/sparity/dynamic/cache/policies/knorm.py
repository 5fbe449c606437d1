"""K-norm: keys with a small norm stay (Devoto et al. 2024, arXiv:2406.11430)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.seen import Seen
from sparity.registry import register


@register("cache.policy", "knorm")
@dataclass(frozen=True)
class KNorm(Policy):
    """A token's score is minus the L2 norm of its key: keys with a small norm draw much attention."""

    evicts_while_decoding: ClassVar[bool] = True

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`."""
        norms: Tensor = seen.keys.float().norm(dim=-1)
        return -norms
