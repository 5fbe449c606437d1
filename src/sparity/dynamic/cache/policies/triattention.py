"""TriAttention: keys by what the centres of queries will pay ahead of them (Mao et al. 2026, arXiv:2604.04921)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.cache.centres import centres_of, spans_of
from sparity.dynamic.cache.learned import Learned, Study
from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.rotary import Rotary, turned
from sparity.dynamic.cache.seen import Reduce, Seen, cut, reduced, with_window
from sparity.registry import register


@register("cache.policy", "triattention")
@dataclass(frozen=True)
class TriAttention(Policy):
    """A key's score is its product with the mean query, turned ahead by growing distances, and what queries vary by.

    Attributes:
        window: of the last tokens, which stay.
        furthest: distance ahead; 1, 2, 4, ... up to it are averaged.
        normalise: take from a head's scores their mean and divide them by their deviation, before heads are compared.
        group: how the query heads that share a key are taken together, `max` or `mean`.
        base: of rotary positions, where the model does not say; 0 = queries are not turned.
    """

    window: int = 128
    furthest: int = 65536
    normalise: bool = False
    group: Reduce = "max"
    base: float = 10000.0
    evicts_while_decoding: ClassVar[bool] = True
    learns: ClassVar[frozenset[str]] = frozenset({"centres", "spans"})
    reads_text: ClassVar[bool] = True

    @property
    def told(self) -> frozenset[str]:
        """See `Policy.told`."""
        return frozenset({"rotary"})

    def learn(self, study: Study) -> Learned:
        """See `Policy.learn`."""
        found, _ = centres_of(study)
        return [{"centres": each.queries.mean(0), "spans": each.spans.mean(0)} for each in found]

    def protected(self, budget: int) -> tuple[int, int]:
        """See `Policy.protected`."""
        return 0, self.window

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`; the window's tokens score as high as the highest before."""
        device, kv_heads = seen.keys.device, seen.keys.shape[1]
        centres, spans = (seen.learned[name].to(device) for name in ("centres", "spans"))
        group, pairs = len(centres) // kv_heads, spans.shape[-1]
        rotary = seen.rotary or (Rotary.of_base(self.base, centres.shape[-1]) if self.base else None)
        ahead = centres
        if rotary is not None:
            next_place = seen.tokens if seen.length is None else seen.length
            cosine, sine = rotary.tables(next_place + self.distances(device))
            ahead = turned(centres, cosine.mean(0), sine.mean(0))
        keys = seen.keys.float()
        varied = (spans - spans_of(centres, pairs)).clamp_min(0)  # a mean is no longer than the mean length
        scores = cut(ahead, 0, group) @ keys.transpose(-1, -2)
        scores = scores + cut(varied, 0, group) @ spans_of(keys, pairs).transpose(-1, -2)
        scores = scores.view(keys.shape[0], kv_heads, group, -1)
        if self.normalise:
            scores = standardised(scores, seen.present)
        return with_window(reduced(scores, self.group, 2)[..., : max(seen.tokens - self.window, 0)], seen.tokens)

    def distances(self, device: torch.device) -> Tensor:
        """1, 2, 4, ... up to `furthest`."""
        return 2 ** torch.arange(self.furthest.bit_length(), device=device)


def standardised(scores: Tensor, present: Tensor | None) -> Tensor:
    """`scores` [batch, kv_heads, group, tokens] of each head with mean 0 and deviation 1, over the tokens present."""
    held = torch.ones_like(scores[:, :, :1]) if present is None else present[:, :, None].float()
    count = held.sum(-1, keepdim=True).clamp_min(1)
    mean = (scores * held).sum(-1, keepdim=True) / count
    deviation = (((scores - mean) ** 2 * held).sum(-1, keepdim=True) / count).sqrt()
    return (scores - mean) / deviation.clamp_min(1e-6)
