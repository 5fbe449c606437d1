"""Quest: whole pages by the most that a query may find in them (Tang et al. 2024, arXiv:2406.10774)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparity.dynamic.cache.policies.base import Policy, highest, ranked
from sparity.dynamic.cache.seen import Reduce, Seen, cut, reduced
from sparity.registry import register


@register("cache.policy", "quest")
@dataclass(frozen=True)
class Quest(Policy):
    """All tokens stay; the last query reads the pages whose bound, sum_i max(q_i min_i, q_i max_i), is highest.

    Attributes:
        page: tokens of a page.
        pages: that are read at least.
        group: how the query heads that share a key are taken together, `max` or `mean`.
        dense: the first layers of a model, which read everything.
    """

    page: int = 16
    pages: int = 3
    group: Reduce = "max"
    dense: int = 2
    counts: ClassVar[bool] = False
    drops: ClassVar[bool] = False

    @property
    def dense_layers(self) -> int:
        """See `Policy.dense_layers`."""
        return self.dense

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`: the bound of a token's page."""
        return self._bounds(seen).repeat_interleave(self.page, -1)[..., : seen.tokens]

    def select(self, seen: Seen, budget: int, protected: Tensor) -> Tensor:
        """See `Policy.select`: whole pages, the last of which may be cut."""
        kept = cut(pad(protected, (0, -seen.tokens % self.page)), -1, self.page).any(-1)
        bounds = ranked(self._bounds(seen), kept, None)
        pages = -(-budget // self.page) if budget >= seen.tokens else budget // self.page
        chosen = highest(bounds, max(pages, self.pages))
        return chosen.repeat_interleave(self.page, -1)[..., : seen.tokens]

    def _bounds(self, seen: Seen) -> Tensor:
        """float32 `[batch, kv_heads, pages]`, in units of logits."""
        keys, short = seen.keys.float(), -seen.tokens % self.page
        low = cut(pad(keys, (0, 0, 0, short), value=torch.inf), 2, self.page).amin(3)
        high = cut(pad(keys, (0, 0, 0, short), value=-torch.inf), 2, self.page).amax(3)
        query = seen.grouped[..., -1, :]  # [batch, kv_heads, group, width]
        bounds = query.clamp_min(0) @ high.transpose(-1, -2) + query.clamp_max(0) @ low.transpose(-1, -2)
        return reduced(bounds, self.group, 2) * seen.scaling
