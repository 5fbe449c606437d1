"""Blocks of attention in a model: `sparity.with_attention_blocks`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from sparity.dynamic.attention.functions import layout_of
from sparity.dynamic.attention.layouts.base import Blocks, Layout
from sparity.dynamic.cache.attention import refuse_unknown, weighted
from sparity.dynamic.cache.own_attention import own_attention
from sparity.dynamic.cache.sight import Sight
from sparity.errors import InvalidInput, UnsupportedModel, wrong_input

PREFIX = "sparity_blocks_"  # before the name of the attention that runs where everything is computed


@contextmanager
def with_attention_blocks(model: Any, *, method: str, block: int | Sequence[int] = 64, **options: Any) -> Iterator[Any]:
    """A model that computes of a prompt's attention the blocks that a layout chooses, within the context.

    Calls of fewer new tokens than a block of queries (decoding, checks of drafts), layers with a sliding window and
    prompts of which every block is chosen are computed by the model's own attention, bit for bit. Elsewhere attention
    is what dense attention would be with the other blocks masked. Left padding lies in no block.

    Args:
        model: a Hugging Face causal language model whose attention is sdpa or eager.
        method: of `sparity methods attention.layout`.
        block: tokens of a block, or `(queries, keys)`.
        options: the method's.

    Yields:
        The model.

    Raises:
        InvalidInput: an unknown method or option, or a layout that is attached already.
        UnsupportedModel: attention that does not go through transformers' interface.

    Example:
        >>> import sparity, torch
        >>> model, ids = sparity.load("zoo:llama"), torch.arange(256)[None]
        >>> with sparity.with_attention_blocks(model, method="local", block=32, window=64):
        ...     logits = model(ids).logits
        >>> bool((logits - model(ids).logits).abs().max() > 0)
        True
    """
    with wrong_input()(_checked)(model, method, block, options) as attached:
        yield attached


def _checked(model: Any, method: str, block: Any, options: dict[str, Any]) -> Any:
    layout, size = layout_of(method, block, options)
    before, kind = model.config._attn_implementation, model.config.model_type
    if before.startswith(PREFIX):
        raise InvalidInput("a layout is at work in this model already: close its context first")
    if not type(model)._can_set_attn_implementation() or before not in ("sdpa", "eager"):
        raise UnsupportedModel(
            f'attention "{before}" of "{kind}" cannot be computed by blocks: load it with sdpa or eager, and put '
            "sparity.cache inside of this context"
        )
    return _attached(model, layout, size, before)


@contextmanager
def _attached(model: Any, layout: Layout, size: tuple[int, int], before: str) -> Iterator[Any]:
    name = PREFIX + before
    AttentionInterface.register(name, partial(_attention, layout, size, before))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.set_attn_implementation(name)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


def _attention(
    layout: Layout,
    size: tuple[int, int],
    before: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **named: Any,
) -> tuple[Tensor, Any]:
    """What the model's own attention gives, or where blocks are left out what the others give."""
    new, scale = query.shape[2], query.shape[-1] ** -0.5 if scaling is None else scaling
    if new >= size[0] and new > 1 and named.get("sliding_window") is None and getattr(module, "is_causal", True):
        refuse_unknown(named)
        sight = Sight(attention_mask, query.shape[0], new, key.shape[2])
        found = _by_blocks(layout, size, query, key, value, sight, scale, named)
        if found is not None:
            return found.transpose(1, 2).contiguous(), None
    return own_attention(before, module)(module, query, key, value, attention_mask, scaling=scaling, **named)


def _by_blocks(
    layout: Layout,
    size: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sight: Sight,
    scaling: float,
    named: dict[str, Any],
) -> Tensor | None:
    """`[rows, heads, new, value_width]`, or None where every block of every row is chosen."""
    pads = (sight.real().cumsum(1) == 0).sum(1).tolist()  # in front of each row
    before = key.shape[2] - query.shape[2]
    chosen = []
    for row, pad in enumerate(pads):
        first = max(pad - before, 0)
        own = Blocks(query[row : row + 1, :, first:].detach(), key[row : row + 1, :, pad:].detach(), size, scaling)
        chosen.append((own, layout.choose(own)[0] & own.causal))
    if all(torch.equal(mask, own.causal.expand(mask.shape)) for own, mask in chosen):
        return None
    drain = named.get("s_aux")
    group = query.shape[1] // key.shape[1]
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=query.dtype, device=query.device)
    for row, (own, mask) in enumerate(chosen):
        skipped = query.shape[2] - own.queries.shape[2]
        for head in range(query.shape[1]):
            keys, values = key[row, head // group], value[row, head // group]
            sinks = None if drain is None else drain[head].float().reshape(1, 1, 1)
            for number in range(own.rows):
                start = skipped + number * size[0]
                end = min(start + size[0], query.shape[2])
                places = _places(mask[head, number], size[1], pads[row], key.shape[2])
                bias = sight.bias(places, start, end, row)
                part = query[row, head, None, start:end]
                found = weighted(part, keys[places], values[places], bias, scaling, named.get("softcap"), sinks)
                out[row, head, start:end] = found[0]
    return out


def _places(columns: Tensor, size: int, pad: int, tokens: int) -> Tensor:
    """Where the keys of some blocks lie, bool `[key blocks]` -> int64 `[keys]`."""
    starts = columns.nonzero() * size + pad
    places = (starts + torch.arange(size, device=columns.device)).flatten()
    return places[places < tokens]
