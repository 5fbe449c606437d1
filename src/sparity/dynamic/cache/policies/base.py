"""What a policy is: it gives the tokens of one layer's cache scores, and says which of them stay."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.cache.learned import Learned, Study
from sparity.dynamic.cache.seen import Seen

ROUNDING = 1e-9  # of a share of a whole number


class Policy(ABC):
    """A rule by which tokens stay; a frozen dataclass whose fields are its options.

    Attributes:
        ragged: heads of one layer may keep different numbers of tokens.
        by_head: each head chooses by itself, and may have a budget of its own.
        accumulates: scores of one call are the `mass` that the next one begins with, so every call is scored.
        remembers: a token's score is found when it is new and kept with it, as its `mass`.
        rereads: after a prompt the model reads it again, and its scores are found then.
        learns: what must be known of the model before, of `retrieval`, `gate`, `centres` and `spans` (`learned.py`).
        reads_text: that is found on text.
        evicts_while_decoding: it was made to evict at every token; others evict when a prompt has been read.
        counts: it keeps exactly the tokens that it is asked for; those that do not are controls or keep whole pages.
        drops: tokens that it does not keep are gone; one that does not drop only chooses which pages are read.
        stores: it says how what is held is stored, by the options `bits`, `group` and `residual`.
        narrows: tokens of a prompt that it does not keep are neither computed nor held in later layers.
        revives: those are chosen anew at every call, and computed then where they were not.
    """

    name: ClassVar[str]
    ragged: ClassVar[bool] = False
    by_head: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    rereads: ClassVar[bool] = False
    learns: ClassVar[frozenset[str]] = frozenset()
    reads_text: ClassVar[bool] = False
    evicts_while_decoding: ClassVar[bool] = False
    counts: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    stores: ClassVar[bool] = False
    narrows: ClassVar[bool] = False
    revives: ClassVar[bool] = False

    @property
    def least(self) -> int:
        """Calls that add fewer tokens to a text evict nothing, unless the policy evicts while decoding."""
        return 32

    @property
    def told(self) -> frozenset[str]:
        """What it is to be told of a layer in a run, of `output_weight`, `rotary` and `hidden`."""
        return frozenset()

    @property
    def turns(self) -> bool:
        """Whether positions are those in the cache: keys are turned as if nothing had been between those that stay."""
        return False

    @property
    def merges(self) -> bool:
        """Whether what goes is merged into one token of each head, which counts as often as there were."""
        return False

    def pairs(self, whole: Sequence[bool]) -> Mapping[int, int]:
        """Layers that are merged with an earlier one, and with which.

        Args:
            whole: of each layer whether its cache holds the whole text.
        """
        return {}

    @property
    def dense_layers(self) -> int:
        """How many of a model's first layers are read whole by a policy that does not drop."""
        return 0

    @property
    def declines(self) -> str | None:
        """Why no run can be asked for this policy with these options, or None."""
        return None

    def protected(self, budget: int) -> tuple[int, int]:
        """How many of the first and of the last tokens always stay, of `budget` that do."""
        return 0, 0

    def budget(self, tokens: int, keep: float, layer: int | None = None, layers: int | None = None) -> int:
        """How many of a layer's tokens stay.

        Args:
            tokens: of the text so far.
            keep: the share of them up to 1, or their number.
            layer: of the model; None = the options say it, or it makes no difference.
            layers: that the model has.
        """
        return kept_of(tokens, keep)

    @property
    def scores_all(self) -> bool:
        """Whether the tokens of every call are scored, and scores held with them."""
        return self.accumulates or self.remembers

    def learn(self, study: Study) -> Learned:
        """What it `learns`, of each block by name.

        Args:
            study: the model, and text where it `reads_text`.

        Raises:
            InvalidInput: text or model are too small for it.
            UnsupportedModel: the model lacks what it rests on.
        """
        return [{} for _ in study.whole]

    @abstractmethod
    def score(self, seen: Seen) -> Tensor:
        """float32 `[batch, kv_heads, tokens]`, higher is kept."""

    def select(self, seen: Seen, budget: int, protected: Tensor) -> Tensor:
        """The tokens that stay, bool `[batch, kv_heads, tokens]`.

        Args:
            seen: the layer.
            budget: how many of each head.
            protected: bool `[batch, kv_heads, tokens]`, tokens that stay in any case; `budget` counts them.
        """
        return best(self.score(seen), budget, protected, seen.present)


class Reader(Policy):
    """A policy under which everything stays, and a query reads some of it: pages of a store."""

    drops: ClassVar[bool] = False

    @property
    def page(self) -> int:
        """Slots of a page."""
        return 1

    @property
    def pages(self) -> int:
        """Pages that are read at least."""
        return 1


def kept_of(tokens: int, keep: float) -> int:
    """`keep` as a number of tokens: a share of them up to 1, or the number itself."""
    return int(tokens * keep + ROUNDING) if keep <= 1 else min(int(keep), tokens)


def ranked(scores: Tensor, protected: Tensor, present: Tensor | None) -> Tensor:
    """`scores` with protected tokens above all others, then NaN, so that a fault shows; what is absent lies below."""
    raised = scores.nan_to_num(nan=torch.finfo(scores.dtype).max).masked_fill(protected, torch.inf)
    return raised if present is None else raised.masked_fill(~present, -torch.inf)


def best(scores: Tensor, budget: int, protected: Tensor, present: Tensor | None = None) -> Tensor:
    """The `budget` highest of each head, bool like `scores` [batch, kv_heads, tokens]; of equal ones the later."""
    found = highest(ranked(scores, protected, present), budget)
    return found if present is None else found & present


def highest(scores: Tensor, count: int) -> Tensor:
    """The `count` highest along the last dimension, bool like `scores`; of equal ones those further back."""
    order = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.shape[-1] - 1 - order, True)
