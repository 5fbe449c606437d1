"""DuoAttention without training: some heads keep everything, others stream (Xiao et al. 2024, arXiv:2410.10819)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.cache.centres import Centres, centres_of
from sparity.dynamic.cache.heads import highest_heads
from sparity.dynamic.cache.learned import Learned, Study
from sparity.dynamic.cache.policies.base import Policy, kept_of
from sparity.dynamic.cache.policies.razorattention import by_place, with_retrieval
from sparity.dynamic.cache.rotary import Rotary
from sparity.dynamic.cache.seen import Seen, cut
from sparity.registry import register


@register("cache.policy", "duoattention")
@dataclass(frozen=True)
class DuoAttention(Policy):
    """Retrieval heads keep every token. Others keep the first and the last ones, also while decoding.

    A KV head is scored by how early its attention comes, where every query and every key is the mean one.

    Attributes:
        heads: the share of all KV heads that are retrieval heads.
        sinks: tokens at the start that every head keeps.
        window: of the last tokens that every head keeps at least.
        length: of the text on which heads are scored.
    """

    heads: float = 0.5
    sinks: int = 64
    window: int = 256
    length: int = 500
    ragged: ClassVar[bool] = True
    counts: ClassVar[bool] = False
    evicts_while_decoding: ClassVar[bool] = True
    learns: ClassVar[frozenset[str]] = frozenset({"retrieval"})
    reads_text: ClassVar[bool] = True

    def learn(self, study: Study) -> Learned:
        """See `Policy.learn`."""
        found, rotary = centres_of(study)
        scores = torch.stack([reach(each, rotary, self.length) for each in found])
        chosen = highest_heads(scores, torch.tensor(list(study.whole)), self.heads)
        return [{"retrieval": each} for each in chosen]

    def protected(self, budget: int) -> tuple[int, int]:
        """See `Policy.protected`."""
        return self.sinks, 0

    def budget(self, tokens: int, keep: float, layer: int | None = None, layers: int | None = None) -> int:
        """See `Policy.budget`: of heads that stream."""
        return min(max(kept_of(tokens, keep), self.sinks + self.window), tokens)

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`: a token's place from 0 to 1; 1 for the first ones and in retrieval heads."""
        return by_place(seen, self.sinks)

    def select(self, seen: Seen, budget: int, protected: Tensor) -> Tensor:
        """See `Policy.select`."""
        return with_retrieval(super().select(seen, budget, protected), seen)


def reach(centres: Centres, rotary: Rotary, length: int) -> Tensor:
    """How early attention comes, float32 `[kv_heads]`: the mean over places of what is paid up to them, by the last.

    The mean of texts, and of the heads of a group.
    """
    places = torch.arange(length)
    queries = rotary.turn(centres.queries, places[-1])
    keys = rotary.turn(centres.keys[:, :, None].expand(-1, -1, length, -1), places)
    grouped = cut(queries, 1, queries.shape[1] // keys.shape[1])  # [texts, kv_heads, group, width]
    paid = (grouped @ keys.transpose(-1, -2) * centres.scaling).softmax(-1)
    return paid.cumsum(-1).mean((0, 2, 3))
