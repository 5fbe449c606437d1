"""Attention to the tokens that a cache still holds: each is seen from its place in the text, as in dense attention."""

from typing import Any

import torch
from torch import Tensor

from sparity.dynamic.cache.in_place import attend_in_place, pages_of
from sparity.dynamic.cache.pages import PagedStore
from sparity.dynamic.cache.reading import Pages
from sparity.dynamic.cache.rotary import Rotary
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.cache.store import Holding
from sparity.dynamic.cache.weighing import AT_ONCE, refuse_unknown, weighted
from sparity.engine.kernels.attention.cpu import Chosen


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
    if turn is None and (read := attend_in_place(query, store, sight, scaling, chosen, **given)) is not None:
        return read
    chosen = pages_of(chosen) if isinstance(chosen, Chosen) else chosen
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


def _with(bias: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """What is added to logits, `[..., queries, slots]`, with `weights` [..., slots] of the slots."""
    if weights is None:
        return bias
    return weights[..., None, :] if bias is None else bias + weights[..., None, :]
