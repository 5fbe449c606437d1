"""The operations between products, as a model's modules compute them: bfloat16 in memory, rounded where modules round.

Attention itself is float64: back ends differ from it by their float32 sums only.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, add: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`x` and `add` [tokens, columns], `weight` [columns] -> `x + add`, and its norm: divided by its rms, weighted."""
    if add is not None:
        x = x + add
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return x, weight * normed.to(x.dtype)


def gate(gates: Tensor, ups: Tensor) -> Tensor:
    """`silu(gates) * ups`, all of one shape."""
    return torch.nn.functional.silu(gates) * ups


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [tokens, heads, width] turned by its position; `cos` and `sin` [tokens, width], first half against second."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """`q` [tokens, heads, width], turned; `keys` and `values` [tokens, kv_heads, length, width] -> like `q`, float64.

    Query heads read the key and value heads in equal groups. `visible` [tokens, length] is False for keys that are not
    seen; a token that sees none gives zeros.
    """
    weights = attention_weights(q, keys, scale, visible)
    return (weights @ values.double()).view(q.shape)


def attention_weights(q: Tensor, keys: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """The softmax weights of `attend`: float64 `[tokens, kv_heads, group, length]`; summed over group: a key's mass."""
    groups = q.double().view(len(q), keys.shape[1], -1, q.shape[2])  # [tokens, kv_heads, group, width]
    scores = groups @ keys.double().transpose(-1, -2) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    return scores.softmax(-1).nan_to_num(0)
