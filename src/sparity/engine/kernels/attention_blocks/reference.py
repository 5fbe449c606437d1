"""What attention by blocks computes, in float64 and with every mask spelled out."""

from collections.abc import Sequence

import torch
from torch import Tensor


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    block: tuple[int, int],
    scale: float,
    *,
    pads: Sequence[int] | None = None,
    cap: float = 0.0,
    drains: Tensor | None = None,
) -> Tensor:
    """`q` [rows, heads, fresh, width], the last tokens of a text -> float64 `[rows, heads, fresh, value_width]`.

    Args:
        q: query heads read the key and value heads in equal groups.
        k: `[rows, kv_heads, tokens, width]`.
        v: `[rows, kv_heads, tokens, value_width]`.
        kept: bool `[rows, heads, query blocks, key blocks]`, True where a block is computed; counted from each row's
            first token behind its padding, of which queries and keys are none. Those beyond a row's last do not count.
        block: queries and keys in a block.
        scale: of logits.
        pads: tokens of padding in front of each row.
        cap: logits become `cap * tanh(logit / cap)`; 0 = they stay.
        drains: `[heads]`, a logit that pays for nothing.
    """
    rows, heads, fresh, _ = q.shape
    tokens, group = k.shape[2], heads // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    logits = q.double() @ k.transpose(-1, -2) * scale
    if cap:
        logits = cap * torch.tanh(logits / cap)
    seen = torch.zeros(rows, heads, fresh, tokens, dtype=torch.bool)
    places = torch.arange(tokens)
    causal = places <= places[tokens - fresh :, None]
    for row, pad in enumerate(pads or [0] * rows):
        skipped = max(pad - (tokens - fresh), 0)
        query = torch.arange(fresh - skipped) // block[0]
        key = torch.arange(tokens - pad) // block[1]
        seen[row, :, skipped:, pad:] = kept[row][:, query][:, :, key] & causal[skipped:, pad:]
    logits = logits.masked_fill(~seen, -torch.inf)
    if drains is not None:
        logits = torch.cat([logits, drains.double().view(1, -1, 1, 1).expand(rows, heads, fresh, 1)], -1)
    weights = logits.softmax(-1).nan_to_num()[..., :tokens]  # a query that sees nothing gives 0
    return weights @ v
