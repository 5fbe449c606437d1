"""RazorAttention: heads that look far back keep all, the others a window (Tang et al. 2024, arXiv:2407.15891)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.cache.heads import retrieval_heads
from sparity.dynamic.cache.learned import Learned, Study
from sparity.dynamic.cache.policies.base import Policy, kept_of
from sparity.dynamic.cache.seen import Seen
from sparity.registry import register


@register("cache.policy", "razorattention")
@dataclass(frozen=True)
class RazorAttention(Policy):
    """Retrieval heads keep every token. Others keep the first and the last ones, and the mean of what went.

    A head is found on random tokens that are repeated, by what it pays to earlier copies of its own token (echo) and to
    the tokens behind them (induction). A KV head is one if any of its query heads is.

    Attributes:
        sinks: tokens at the start that every head keeps.
        window: tokens that every head keeps at least.
        compensate: keep of what went one token, the mean of keys and of values, which counts as often as there were.
        induction: the share of all heads that are retrieval heads by induction.
        echo: the share that are by echo.
        tokens: random tokens; no more than the model's positions and words allow.
        repeats: how often they follow one another.
        seed: of the tokens.
    """

    sinks: int = 4
    window: int = 4000
    compensate: bool = True
    induction: float = 0.14
    echo: float = 0.01
    tokens: int = 2500
    repeats: int = 4
    seed: int = 0
    ragged: ClassVar[bool] = True
    counts: ClassVar[bool] = False
    learns: ClassVar[frozenset[str]] = frozenset({"retrieval"})

    def learn(self, study: Study) -> Learned:
        """See `Policy.learn`."""
        return [{"retrieval": heads} for heads in retrieval_heads(study.decoder, self, study.whole)]

    @property
    def merges(self) -> bool:
        """See `Policy.merges`."""
        return self.compensate

    def protected(self, budget: int) -> tuple[int, int]:
        """See `Policy.protected`."""
        return self.sinks, 0

    def budget(self, tokens: int, keep: float, layer: int | None = None, layers: int | None = None) -> int:
        """See `Policy.budget`: of heads that are no retrieval heads."""
        return min(max(kept_of(tokens, keep), self.window), tokens)

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`: a token's place from 0 to 1; 1 for the first ones and in retrieval heads."""
        return by_place(seen, self.sinks)

    def select(self, seen: Seen, budget: int, protected: Tensor) -> Tensor:
        """See `Policy.select`."""
        return with_retrieval(super().select(seen, budget, protected), seen)


def by_place(seen: Seen, sinks: int) -> Tensor:
    """A token's place among those that are held, from 0 to 1; 1 for the first `sinks` and in retrieval heads."""
    places = torch.linspace(0, 1, seen.tokens, device=seen.keys.device)
    scores = places.expand(seen.keys.shape[:3]).clone()
    scores[..., :sinks] = 1
    return scores if seen.retrieval is None else scores.masked_fill(seen.retrieval[:, None].to(scores.device), 1)


def with_retrieval(chosen: Tensor, seen: Seen) -> Tensor:
    """`chosen` [batch, kv_heads, tokens] with all tokens of the retrieval heads."""
    if seen.retrieval is not None:
        chosen = chosen | seen.retrieval[:, None].to(chosen.device)
    return chosen if seen.present is None else chosen & seen.present
