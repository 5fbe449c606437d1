"""Attention of some queries to keys and values, with whatever is added to their logits."""

from typing import Any

import torch
from torch import Tensor

from sparity.errors import UnsupportedModel

AT_ONCE = 256  # queries whose attention weights are in memory together
REFUSED = ("position_bias", "head_mask")  # given by name, and they would change the result


def refuse_unknown(given: dict[str, Any]) -> None:
    """Refuse what attention is given by name and what is not computed here; raises `UnsupportedModel`."""
    if odd := [name for name in REFUSED if given.get(name) is not None]:
        raise UnsupportedModel(f"attention is given {odd[0]}, which a cache with a policy does not compute")


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
