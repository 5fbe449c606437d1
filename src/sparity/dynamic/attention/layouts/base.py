"""What a layout is: it says which blocks of queries and keys are computed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from sparity.dynamic.cache.seen import cut


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of one layer, cut into blocks; a query attends to the keys up to its own place.

    Attributes:
        queries: `[batch, heads, new, width]`, after rotary, of the last `new` tokens.
        keys: `[batch, kv_heads, tokens, width]`, after rotary.
        size: queries and keys in a block; the last blocks may be shorter.
        scaling: what the products of queries and keys are multiplied by.
    """

    queries: Tensor
    keys: Tensor
    size: tuple[int, int]
    scaling: float

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return -(-self.queries.shape[2] // self.size[0])

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return -(-self.keys.shape[2] // self.size[1])

    @property
    def before(self) -> int:
        """Keys that lie before the first query's own."""
        return self.keys.shape[2] - self.queries.shape[2]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a mask: batch, heads, query blocks, key blocks."""
        return (self.queries.shape[0], self.queries.shape[1], self.rows, self.columns)

    @cached_property
    def last_key(self) -> Tensor:
        """`[rows]`: the last key that any query of a block attends to."""
        device = self.keys.device
        ends = ((torch.arange(self.rows, device=device) + 1) * self.size[0]).clamp_max(self.queries.shape[2])
        return ends - 1 + self.before

    @cached_property
    def first_own(self) -> Tensor:
        """`[rows]`: the first key that is a block's own: that of its first query."""
        return torch.arange(self.rows, device=self.keys.device) * self.size[0] + self.before

    @cached_property
    def key_starts(self) -> Tensor:
        """`[columns]`: the first key of each block."""
        return torch.arange(self.columns, device=self.keys.device) * self.size[1]

    @cached_property
    def causal(self) -> Tensor:
        """bool `[rows, columns]`: blocks in which some query attends to some key."""
        return self.key_starts <= self.last_key[:, None]

    @cached_property
    def diagonal(self) -> Tensor:
        """bool `[rows, columns]`: blocks in which some query attends to its own key."""
        return self.causal & (self.key_starts + self.size[1] > self.first_own[:, None])

    @cached_property
    def shared_keys(self) -> Tensor:
        """The keys, float32 `[batch, heads, tokens, width]`, those of a group repeated."""
        return self.keys.float().repeat_interleave(self.queries.shape[1] // self.keys.shape[1], 1)

    def whole(self, mask: Tensor) -> Tensor:
        """bool `[rows, columns]` as the mask of every row of the batch and every head."""
        return mask.expand(self.shape).clone()

    def last_weights(self, count: int) -> Tensor:
        """What the last `count` queries pay, float32 `[batch, heads, count, tokens]`."""
        last, tokens = self.queries[:, :, -count:].float(), self.keys.shape[2]
        products = last @ self.shared_keys.transpose(-1, -2) * self.scaling
        places = torch.arange(tokens, device=self.keys.device)
        hidden = places > places[tokens - last.shape[2] :, None]
        weights: Tensor = products.masked_fill(hidden, -torch.inf).softmax(-1)
        return weights


class Layout(ABC):
    """A way to choose blocks; a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    share: ClassVar[str | None] = None  # the option that says how much; float64 `[heads]` sets each

    @abstractmethod
    def choose(self, blocks: Blocks) -> Tensor:
        """bool `[batch, heads, query blocks, key blocks]`, True where a block is computed; causal ones alone count."""


def summed(x: Tensor, size: int) -> Tensor:
    """`x` [..., tokens] -> `[..., blocks]`, the sum of each block."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    return cut(padded, -1, size).sum(-1)


def means(x: Tensor, size: int) -> Tensor:
    """`x` [..., tokens, width] -> float32 `[..., blocks, width]`, the mean of each block."""
    total = summed(x.float().transpose(-1, -2), size).transpose(-1, -2)
    counts = summed(x.new_ones(x.shape[-2]).float(), size)
    return total / counts[:, None]


def by_head(share: float | Tensor, weights: Tensor) -> float | Tensor:
    """A share, or those `[heads]`, as they meet `weights` [batch, heads, ...]."""
    return share.view(-1, *[1] * (weights.ndim - 2)) if isinstance(share, Tensor) else share


def covering(weights: Tensor, share: float | Tensor, forced: Tensor) -> Tensor:
    """The fewest highest `weights` [batch, heads, ..., n] whose sum is at least a share of all.

    Those that `forced` names come first; of equal ones the later. bool like `weights`.
    """
    weights, forced = weights.double(), forced.expand(weights.shape)
    order = weights.masked_fill(forced, torch.inf).flip(-1).sort(dim=-1, descending=True, stable=True).indices
    order = weights.shape[-1] - 1 - order
    counted = weights.gather(-1, order)
    before = counted.cumsum(-1) - counted
    needed = before < by_head(share, weights) * counted.sum(-1, keepdim=True) * (1 - 1e-12)
    return torch.zeros_like(forced).scatter(-1, order, needed) | forced


def diagonals(weights: Tensor, distances: int) -> Tensor:
    """`weights` [batch, heads, count, tokens] of the last queries -> what falls on each distance, `[..., distances]`.

    Distance 0 is a query's own token.
    """
    count, tokens = weights.shape[-2:]
    places = torch.arange(tokens, device=weights.device)
    distance = places[tokens - count :, None] - places  # [count, tokens]
    found = weights.new_zeros(*weights.shape[:2], distances + 1)
    where = distance.where((distance >= 0) & (distance < distances), distances).flatten()
    return found.index_add(-1, where, weights.flatten(2))[..., :distances]
