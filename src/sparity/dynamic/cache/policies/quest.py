"""Quest: whole pages by the most that a query may find in them (Tang et al. 2024, arXiv:2406.10774)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparity.dynamic.cache.policies.base import Reader, highest, ranked
from sparity.dynamic.cache.seen import Reduce, Seen, cut, reduced
from sparity.registry import register


@register("cache.policy", "quest")
@dataclass(frozen=True)
class Quest(Reader):
    """All tokens stay; the last query reads the pages whose bound, sum_i max(q_i min_i, q_i max_i), is highest.

    Attributes:
        page: tokens of a page.
        pages: that are read at least.
        group: how the query heads that share a key are taken together, `max` or `mean`.
        dense: the first layers of a model, which read everything.
        by: what a page is judged by, its `bound`, or the query's product with the `mean` of its keys (MoBA).
    """

    page: int = 16
    pages: int = 3
    group: Reduce = "max"
    dense: int = 2
    by: Literal["bound", "mean"] = "bound"
    counts: ClassVar[bool] = False

    @property
    def dense_layers(self) -> int:
        """See `Policy.dense_layers`."""
        return self.dense

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`: the bound of a token's page."""
        return (self._bounds(seen) * seen.scaling).repeat_interleave(self.page, -1)[..., : seen.tokens]

    def select(self, seen: Seen, budget: int, protected: Tensor) -> Tensor:
        """See `Policy.select`: whole pages, the last of which may be cut."""
        kept = cut(pad(protected, (0, -seen.tokens % self.page)), -1, self.page).any(-1)
        chosen = self.chosen(self._bounds(seen), kept, budget, seen.tokens)
        return chosen.repeat_interleave(self.page, -1)[..., : seen.tokens]

    def bounds(self, query: Tensor, low: Tensor, high: Tensor, mean: Tensor | None) -> Tensor:
        """What pages are judged by, float32 `[..., pages]`, before scaling.

        Args:
            query: float32 `[..., group, width]`.
            low: least of each page's keys, `[..., pages, width]`.
            high: greatest, likewise.
            mean: mean, likewise; None = unknown, `by` needs it not.
        """
        if self.by == "mean":
            assert mean is not None, "means are asked for"
            found = query @ mean.float().transpose(-1, -2)
        else:
            positive, negative = query.clamp_min(0), query.clamp_max(0)
            found = positive @ high.float().transpose(-1, -2) + negative @ low.float().transpose(-1, -2)
        return reduced(found, self.group, -2)

    def chosen(self, bounds: Tensor, kept: Tensor, budget: int, tokens: int) -> Tensor:
        """The pages that are read, bool like `bounds` [..., pages], for `budget` of `tokens`; first those of `kept`."""
        pages = bounds.shape[-1] if budget >= tokens else budget // self.page
        return highest(ranked(bounds, kept, None), max(pages, self.pages))

    def _bounds(self, seen: Seen) -> Tensor:
        """float32 `[batch, kv_heads, pages]`."""
        keys, short = seen.keys.float(), -seen.tokens % self.page
        low = cut(pad(keys, (0, 0, 0, short), value=torch.inf), 2, self.page).amin(3)
        high = cut(pad(keys, (0, 0, 0, short), value=-torch.inf), 2, self.page).amax(3)
        total = cut(pad(keys, (0, 0, 0, short)), 2, self.page).sum(3)
        counts = torch.full((total.shape[2], 1), float(self.page), device=keys.device)
        counts[-1] -= short
        return self.bounds(seen.grouped[..., -1, :], low, high, total / counts)
