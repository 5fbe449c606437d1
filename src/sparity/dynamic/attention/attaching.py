"""Blocks of attention in a model: `sparity.with_attention_blocks`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from sparity.dynamic.attention.computing import Call, Choice, LastMask
from sparity.dynamic.attention.functions import layout_of
from sparity.dynamic.cache.own_attention import own_attention
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.cache.weighing import refuse_unknown
from sparity.errors import InvalidInput, UnsupportedModel, wrong_input

PREFIX = "sparity_blocks_"  # before the name of the attention that runs where everything is computed


@contextmanager
def with_attention_blocks(
    model: Any,
    *,
    method: str,
    block: int | Sequence[int] = 64,
    shortest: int = 1,
    shares: Sequence[Tensor] | None = None,
    **options: Any,
) -> Iterator[Any]:
    """A model that computes of a prompt's attention the blocks that a layout chooses, within the context.

    Calls of fewer new tokens than a block of queries (decoding, checks of drafts), shorter texts than `shortest`,
    layers with a sliding window and prompts of which every block is chosen are computed by the model's own attention,
    bit for bit. Elsewhere attention is what dense attention would be with the other blocks masked. Left padding lies in
    no block.

    On a CPU, heads in float32 or bfloat16 run a compiled kernel that leaves the other blocks out; elsewhere PyTorch
    computes block by block, which is slow.

    Args:
        model: a Hugging Face causal language model whose attention is sdpa or eager.
        method: of `sparity methods attention.layout`.
        block: tokens of a block, or `(queries, keys)`.
        shortest: tokens of the text, padding counted, below which everything is computed.
        shares: what `sparity.calibrate_attention` found, of each layer float64 `[heads]`.
        options: the method's.

    Yields:
        The model.

    Raises:
        InvalidInput: an unknown method or option, shares of another model, or a layout that is attached already.
        UnsupportedModel: attention that does not go through transformers' interface.

    Example:
        >>> import sparity, torch
        >>> model, ids = sparity.load("zoo:llama"), torch.arange(256)[None]
        >>> with sparity.with_attention_blocks(model, method="local", block=32, window=64):
        ...     logits = model(ids).logits
        >>> bool((logits - model(ids).logits).abs().max() > 0)
        True
    """
    with wrong_input()(_checked)(model, method, block, shortest, shares, options) as attached:
        yield attached


def _checked(model: Any, method: str, block: Any, shortest: Any, shares: Any, options: dict[str, Any]) -> Any:
    if isinstance(shortest, bool) or not isinstance(shortest, int) or shortest < 1:
        raise InvalidInput(f"shortest {shortest!r} must be a number of tokens, 1 or more")
    layout, size = layout_of(method, block, options)
    config = model.config.get_text_config(decoder=True)
    wanted = (int(config.num_hidden_layers), int(config.num_attention_heads))
    if shares is not None:
        found = [list(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in shares]
        if found != [[wanted[1]]] * wanted[0]:
            raise InvalidInput(f"shares must be {wanted[0]} tensors [{wanted[1]}], one for each layer of this model")
    return attached(model, Choice(layout, size, tuple(shares or ())), shortest)


def check_attention(model: Any) -> None:
    """Refuse a model whose attention cannot be computed by blocks.

    Raises:
        InvalidInput: a layout is attached already.
        UnsupportedModel: attention that does not go through transformers' interface.
    """
    before, kind = model.config._attn_implementation, model.config.model_type
    if before.startswith(PREFIX):
        raise InvalidInput("a layout is at work in this model already: close its context first")
    if not type(model)._can_set_attn_implementation() or before not in ("sdpa", "eager"):
        raise UnsupportedModel(
            f'attention "{before}" of "{kind}" cannot be computed by blocks: load it with sdpa or eager, and put '
            "sparity.cache inside of this context"
        )


@dataclass
class _Attached:
    """Stands where a model's own attention was."""

    choose: Choice
    shortest: int
    before: str
    masks: LastMask = field(default_factory=LastMask)


@contextmanager
def attached(model: Any, choose: Choice, shortest: int) -> Iterator[Any]:
    """Let a model's prompts be computed by blocks until the context closes; raises as `check_attention` does."""
    check_attention(model)
    before = model.config._attn_implementation
    name = PREFIX + before
    AttentionInterface.register(name, partial(_attention, _Attached(choose, shortest, before)))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.set_attn_implementation(name)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


def _attention(
    of: _Attached,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **named: Any,
) -> tuple[Tensor, Any]:
    """What the model's own attention gives, or where blocks are left out what the others give."""
    new, length = query.shape[2], key.shape[2]
    long = new >= of.choose.size[0] and new > 1 and length >= of.shortest
    if long and named.get("sliding_window") is None and getattr(module, "is_causal", True):
        refuse_unknown(named)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        sight = Sight(attention_mask, query.shape[0], new, length)
        if bool(sight.real()[:, -1].all()):  # else the text ends before the keys do: a static cache, padding behind it
            call = Call(query, key, value, sight, scale, named, of.masks.sees_its_past(sight))
            chosen = call.chosen(of.choose, getattr(module, "layer_idx", None) or 0)
            if chosen is not None:
                return call.attend(chosen, of.choose.size), None
    return own_attention(of.before, module)(module, query, key, value, attention_mask, scaling=scaling, **named)
