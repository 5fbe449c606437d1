"""The attention function of a model whose cache has a policy."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from sparity.dynamic.cache.attention import attend
from sparity.dynamic.cache.in_place import attend_in_place
from sparity.dynamic.cache.layer import ATTRIBUTE, PolicyLayer
from sparity.dynamic.cache.narrowing import choose
from sparity.dynamic.cache.own_attention import own_attention
from sparity.dynamic.cache.prompt import Prompt
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.cache.store import Store
from sparity.dynamic.cache.weighing import REFUSED


def attention(
    before: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **named: Any,
) -> tuple[Tensor, Any]:
    """What the model's own attention gives, or where tokens were evicted what is held gives."""
    layer: PolicyLayer | None = getattr(key, ATTRIBUTE, None)
    own = partial(
        own_attention(before, module),
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        dropout=dropout,
        **named,
    )
    if layer is None:
        return own()
    store, scale = layer.store, query.shape[-1] ** -0.5 if scaling is None else scaling
    assert store is not None, "attention follows an update"
    cap, passing = named.get("softcap"), layer.run.passing
    length = layer.length if passing is None else key.shape[2]
    sight = Sight(attention_mask, query.shape[0], query.shape[2], length, named.get("sliding_window"))
    if passing is not None:
        layer.read(module, query, sight, scale, cap)
        choose(layer, query, sight, scale, cap)
        if isinstance(passing, Prompt) or not passing.narrowed:
            return own()  # what is read is what is given
        assert isinstance(store, Store), "tokens are stored as they are"
        return passing.attend(query, store, scale, **named), None
    chosen = layer.chosen(query, sight, scale, cap)
    if layer.partial or chosen is not None:
        turn = layer.run.rotary if layer.run.policy.turns else None
        found = attend(query, store, sight, scale, chosen, turn, **named), None
    else:
        read = None
        if layer.run.rounds(layer.length) and not any(named.get(name) is not None for name in REFUSED):
            read = attend_in_place(query, store, sight, scale, softcap=cap, s_aux=named.get("s_aux"))
        found = own() if read is None else (read, None)
    if layer.run.reading is not None:
        layer.run.reading.see(layer, module, query, scale, cap)
    else:
        layer.read(module, query, sight, scale, cap)
    return found
