"""Attention to the tokens that a cache still holds: each is seen from its place in the text, as in dense attention."""

from typing import Any

import torch
from torch import Tensor

from sparity.dynamic.cache.pages import PagedStore
from sparity.dynamic.cache.reading import Pages
from sparity.dynamic.cache.rotary import Rotary
from sparity.dynamic.cache.store import Holding
from sparity.errors import UnsupportedModel

AT_ONCE = 256  # queries whose attention weights are in memory together
REFUSED = ("position_bias", "head_mask")  # given by name, and they would change the result


class Sight:
    """Which places of the text the new queries of a call see, from the mask that transformers made for all of them.

    Args:
        mask: None (causal), `[rows, tokens]` (0 = padding), or `[rows or 1, 1, new, tokens]`, bool or added to logits.
        rows: of the batch.
        new: queries of each.
        length: tokens of the text, the new ones included.
        window: how many tokens back a query sees at most; None = all.

    Raises:
        UnsupportedModel: a mask of another shape.
    """

    def __init__(self, mask: Tensor | None, rows: int, new: int, length: int, window: int | None = None) -> None:
        self.rows, self.new, self.length, self.window = rows, new, length, window
        if mask is not None and not (
            (mask.ndim == 2 and mask.shape == (rows, length))
            or (
                mask.ndim == 4 and mask.shape[0] in (1, rows) and mask.shape[1] == 1 and mask.shape[2:] == (new, length)
            )
        ):
            raise UnsupportedModel(
                f"attention masks must be [rows, tokens] or [rows, 1, new, tokens] where tokens were evicted, got "
                f"{list(mask.shape)} for {rows} rows, {new} new of {length} tokens"
            )
        self.mask = mask

    @property
    def everything(self) -> bool:
        """Whether the last query sees every token of the text."""
        return self.mask is None and (self.window is None or self.length <= self.window)

    def real(self) -> Tensor:
        """bool `[rows, length]` on the CPU: tokens that are no padding, as the last query sees it."""
        if self.mask is None:
            return torch.ones(self.rows, self.length, dtype=torch.bool)
        if self.mask.ndim == 2:
            return self.mask.cpu() != 0
        last = self.mask[:, 0, -1, : self.length]
        seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
        return seen.expand(self.rows, -1).cpu()

    def bias(self, places: Tensor, first: int, last: int, row: int | None = None) -> Tensor | None:
        """What is added to logits of the queries `first` to `last - 1`, float32 `[..., last - first, slots]`, or None.

        Args:
            places: `[..., slots]` of slots; with `row`, of one row's, else `[rows, heads, slots]`.
            first: query.
            last: query after the last.
            row: of the batch.
        """
        own = torch.arange(self.length - self.new + first, self.length - self.new + last, device=places.device)
        if self.mask is None and last - first == 1 and last == self.new and self.everything:
            return None
        places = places.long()[..., None, :]
        visible = places <= own[:, None]
        if self.window is not None:
            visible = visible & (places > own[:, None] - self.window)
        bias = torch.zeros(visible.shape, device=places.device).masked_fill(~visible, -torch.inf)
        if self.mask is None:
            return bias
        table = self._table(first, last, row)  # [rows or 1, 1, queries, length], or without rows
        index = places.expand(*visible.shape)
        table = table.expand(*visible.shape[:-2], *table.shape[-2:]).expand(*visible.shape[:-1], table.shape[-1])
        return bias + table.gather(-1, index)

    def _table(self, first: int, last: int, row: int | None) -> Tensor:
        assert self.mask is not None
        mask = self.mask[:, None, None] if self.mask.ndim == 2 else self.mask[:, :, first:last]
        mask = mask.expand(self.rows, -1, -1, -1)
        mask = mask if row is None else mask[row, 0]
        if not mask.is_floating_point():
            return torch.zeros(mask.shape, device=mask.device).masked_fill(mask == 0, -torch.inf)
        return mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)


def attend(
    query: Tensor,
    store: Holding,
    sight: Sight,
    scaling: float,
    chosen: Pages | None = None,
    turn: Rotary | None = None,
    **given: Any,
) -> Tensor:
    """`query` [rows, heads, new, width] -> `[rows, new, heads, value_width]`, in its type; logits are float32.

    Args:
        query: after rotary.
        store: what is held, the new tokens included.
        sight: what is seen of the text.
        scaling: of logits.
        chosen: the pages that alone are read, of a store in pages; None = all.
        turn: by which keys are turned to their places in the cache; None = they stay where they are in the text.
        given: `softcap`, and `s_aux` (gpt-oss: a logit per head that pays for nothing).

    Raises:
        UnsupportedModel: attention is given something else that may change it.
    """
    refuse_unknown(given)
    cap, drain = given.get("softcap"), given.get("s_aux")
    rows, heads, new, _ = query.shape
    group = heads // store.heads
    grouped = query.reshape(rows, store.heads, group, new, -1)
    drains = None if drain is None else drain.float().reshape(store.heads, group, 1, 1)
    out = query.new_empty(rows, store.heads, group, new, store.value_width)
    if store.even is not None and not isinstance(chosen, list):
        hidden = None
        if chosen is None:
            keys, values, places, _ = store.views()
        else:
            assert isinstance(store, PagedStore), "pages are chosen of a store in pages"
            keys, values, places, hidden = store.gathered(chosen)
        keys = keys if turn is None else closed_up(keys, places, sight.length, turn)
        for first in range(0, new, AT_ONCE):
            cut = slice(first, min(first + AT_ONCE, new))
            bias = _with(sight.bias(places, cut.start, cut.stop), None if hidden is not None else store.weights())
            if hidden is not None:
                bias = torch.zeros(places[..., None, :].shape, device=query.device) if bias is None else bias
                bias = bias.masked_fill(hidden[..., None, :], -torch.inf)
            out[..., cut, :] = weighted(grouped[..., cut, :], keys, values, bias, scaling, cap, drains)
    else:
        for row in range(rows):
            for head in range(store.heads):
                pages = None if chosen is None else chosen[row * store.heads + head]
                keys, values, places = store.segment(row, head, pages)
                keys = keys if turn is None else closed_up(keys, places, sight.length, turn)
                own = None if drains is None else drains[head]
                for first in range(0, new, AT_ONCE):
                    cut = slice(first, min(first + AT_ONCE, new))
                    bias = _with(sight.bias(places, cut.start, cut.stop, row), store.weights(row, head))
                    part = grouped[row, head][:, cut]
                    out[row, head][:, cut] = weighted(part, keys, values, bias, scaling, cap, own)
    return out.reshape(rows, heads, new, -1).transpose(1, 2).contiguous()


def closed_up(keys: Tensor, places: Tensor, length: int, turn: Rotary) -> Tensor:
    """`keys` [..., slots, width] as if the text ended with the slots, one behind the other, at its `length`.

    Attention sees differences of positions only, so keys are turned forward where the authors' code would turn the
    query and all others back. What lies at the end without a gap stays as it is.
    """
    slots = places.shape[-1]
    ahead = torch.arange(length - slots, length, device=places.device) - places
    moved = turn.turn(keys.float(), ahead).to(keys.dtype)
    return torch.where((ahead == 0)[..., None], keys, moved)


def refuse_unknown(given: dict[str, Any]) -> None:
    """Refuse what attention is given by name and what `attend` does not compute; raises `UnsupportedModel`."""
    if odd := [name for name in REFUSED if given.get(name) is not None]:
        raise UnsupportedModel(f"attention is given {odd[0]}, which a cache with a policy does not compute")


def _with(bias: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """What is added to logits, `[..., queries, slots]`, with `weights` [..., slots] of the slots."""
    if weights is None:
        return bias
    return weights[..., None, :] if bias is None else bias + weights[..., None, :]


def weighted(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scaling: float,
    cap: float | None,
    drain: Tensor | None,
) -> Tensor:
    """`query` [..., group, new, width], keys and values [..., slots, width] -> `[..., group, new, value_width]`."""
    group, new = query.shape[-3:-1]
    packed = query.flatten(-3, -2)  # the heads of a group share one product
    logits = (packed @ keys.transpose(-1, -2)).float() * scaling
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits.reshape(*logits.shape[:-2], group, new, -1)
    if bias is not None:
        logits = logits + bias.unsqueeze(-3)
    highest = logits.amax(-1, keepdim=True) if drain is None else logits.amax(-1, keepdim=True).maximum(drain)
    weights = (logits - highest.clamp_min(torch.finfo(logits.dtype).min)).exp()
    total = weights.sum(-1, keepdim=True)
    if drain is not None:
        total = total + (drain - highest).exp()
    weights = (weights / total.clamp_min(torch.finfo(logits.dtype).tiny)).to(
        values.dtype
    )  # a query that sees nothing gets 0
    return (weights.flatten(-3, -2) @ values).reshape(*query.shape[:-1], -1)
