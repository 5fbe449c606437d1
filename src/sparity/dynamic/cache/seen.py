"""What a policy sees of one layer, and the attention that the last queries pay in it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from sparity.dynamic.cache.rotary import Rotary

AT_ONCE = 256  # queries whose attention weights are in memory together
Pooling = Literal["avg", "max"]
Reduce = Literal["mean", "max"]


@dataclass(frozen=True)
class Seen:
    """One layer's keys and values, and the queries of the last tokens.

    Attributes:
        queries: `[batch, heads, new, width]`, after rotary, of the last `new` tokens.
        keys: `[batch, kv_heads, tokens, width]`, after rotary, in the order of the text.
        values: `[batch, kv_heads, tokens, value_width]`.
        scaling: what the products of queries and keys are multiplied by.
        softcap: the bound of those products, where the model has one.
        present: bool `[batch, kv_heads, tokens]`, where heads hold different numbers of tokens; None = all are there.
        mass: float32 `[batch, kv_heads, tokens]`, what the policy accumulated before these queries; 0 for new tokens.
        output_weight: `[heads, value_width, hidden]`, each head's part of the output projection; None = unknown.
        rotary: how positions turn queries and keys; None = they do not, or it is not known.
        learned: what was found of the model before, by name (`learned.py`).
        length: tokens of the text so far, those included that are gone; the last query's position is one less.
        hidden: `[batch, new, hidden]`, what the projection of keys read for these queries' tokens; None = unknown.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    softcap: float | None = None
    present: Tensor | None = None
    mass: Tensor | None = None
    output_weight: Tensor | None = None
    rotary: Rotary | None = None
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    length: int | None = None
    hidden: Tensor | None = None

    @property
    def retrieval(self) -> Tensor | None:
        """bool `[kv_heads]`, heads that look far back; None = unknown."""
        return self.learned.get("retrieval")

    @property
    def tokens(self) -> int:
        """How many tokens are held."""
        return self.keys.shape[2]

    @property
    def grouped(self) -> Tensor:
        """The queries, float32 `[batch, kv_heads, group, new, width]`: those that share keys stand together."""
        batch, heads, new, width = self.queries.shape
        kv_heads = self.keys.shape[1]
        return self.queries.float().reshape(batch, kv_heads, heads // kv_heads, new, width)

    def weights(self, first: int, last: int) -> Tensor:
        """What the queries `first` to `last - 1` pay, float32 `[batch, kv_heads, group, last - first, tokens]`."""
        new = self.queries.shape[2]
        products = self.grouped[..., first:last, :] @ self.keys.float()[:, :, None].transpose(-1, -2) * self.scaling
        if self.softcap is not None:
            products = self.softcap * torch.tanh(products / self.softcap)
        slots = torch.arange(self.tokens, device=self.keys.device)
        places = torch.arange(first, last, device=self.keys.device) + self.tokens - new
        hidden = slots > places[:, None]
        if self.present is not None:
            hidden = hidden | ~self.present[:, :, None, None]
        return products.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()  # a head that holds nothing pays 0

    def blocks(self) -> Iterator[Tensor]:
        """`weights` of all queries, some at a time."""
        new = self.queries.shape[2]
        for first in range(0, new, AT_ONCE):
            yield self.weights(first, min(first + AT_ONCE, new))


def cut(x: Tensor, dim: int, size: int) -> Tensor:
    """`x` with one dimension cut into pieces of `size`: `[..., pieces, size, ...]`."""
    dim %= x.ndim
    return x.reshape(*x.shape[:dim], -1, size, *x.shape[dim + 1 :])


def reduced(x: Tensor, how: Reduce, dim: int) -> Tensor:
    """The mean or the largest along a dimension."""
    return x.mean(dim) if how == "mean" else x.amax(dim)


def pooled(x: Tensor, kernel: int, pooling: Pooling) -> Tensor:
    """`x` [..., tokens], each the mean (zeros beyond the ends counted) or the largest of its `kernel` neighbours."""
    if not x.shape[-1]:
        return x
    pool = avg_pool1d if pooling == "avg" else max_pool1d
    return pool(x.reshape(1, -1, x.shape[-1]), kernel, stride=1, padding=kernel // 2).reshape(x.shape)


def window_weights(seen: Seen, window: int) -> Tensor:
    """What the last `window` queries pay to the tokens before them: `[batch, kv_heads, group, rows, tokens - window]`.

    Fewer queries than `window` are all that there are.
    """
    new = seen.queries.shape[2]
    return seen.weights(max(new - window, 0), new)[..., : max(seen.tokens - window, 0)]


def with_window(scores: Tensor, tokens: int) -> Tensor:
    """`scores` [batch, kv_heads, tokens before a window], with the window's tokens as high as the highest before."""
    if not scores.shape[-1]:
        return scores.new_zeros(*scores.shape[:-1], tokens)
    missing = tokens - scores.shape[-1]
    return torch.cat([scores, scores.amax(-1, keepdim=True).expand(*scores.shape[:-1], missing)], -1)
