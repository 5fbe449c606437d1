"""Attention of a model, watched call by call while its own function runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from sparity.dynamic.cache.own_attention import own_attention

PREFIX = "sparity_watched_"  # before the name of the attention that is watched
Watch = Callable[[nn.Module, tuple[Tensor, Tensor, Tensor], float, float | None], None]


@contextmanager
def watched(model: Any, watch: Watch) -> Iterator[None]:
    """Tell `watch` the module, its queries, keys and values, the scaling and the bound of logits of every call."""
    before = model.config._attn_implementation
    name = PREFIX + before
    AttentionInterface.register(name, partial(_watched, watch, before))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _watched(
    watch: Watch, before: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **named: Any
) -> Any:
    scaling = named.get("scaling")
    watch(module, (query, key, value), query.shape[-1] ** -0.5 if scaling is None else scaling, named.get("softcap"))
    return own_attention(before, module)(module, query, key, value, mask, **named)
